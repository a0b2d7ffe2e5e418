"""Random row programs for fuzzing: differentiation against autograd, executors against the interpreter.

The numbers stay of moderate size over any number of steps, and what jumps (rounding, comparisons, argmax) is
asked only of values that every executor has exactly: step and context inputs and movements of them.

Example:
    >>> made = random_program(seed=3, depth=5, max_width=8)
    >>> inputs = made.inputs(rows=2, steps=4, seed=0)
    >>> sorted(inputs) == sorted(made.program.inputs)
    True
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastwm.row_program import Program, Val
from fastwm.row_program.ops import UNARY

JUMPS = {"sign", "floor", "ceil", "round", "trunc", "not", "isnan", "isfinite"}
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")
PARAMETERS: dict[str, dict[str, float]] = {
    "leaky_relu": {"slope": 0.1},
    "softplus": {"beta": 1.5, "threshold": 20.0},
    "safe_tanh": {"limit": 0.999},
    "elu": {"alpha": 1.2, "scale": 1.1, "input_scale": 0.9},
}
ACTIVATIONS = (
    *("relu", "tanh", "sigmoid", "silu", "elu", "leaky_relu", "gelu", "gelu_tanh", "softplus"),
    *("mish", "log_sigmoid"),
)
BLOCKS = (
    *("linear",) * 4, *("binary",) * 4, *("unary",) * 4, *("where",) * 2, *("reduce",) * 2,
    "grouped_linear", "member_linear", "cast", "softmax", "layer_norm", "one_hot", "take", "index",
    "concat", "gates", "fill", "row",
)  # fmt: skip


@dataclass
class RandomProgram:
    program: Program
    draws: dict[str, Callable[[torch.Generator, tuple[int, ...]], torch.Tensor]] = field(
        default_factory=dict
    )

    def inputs(self, rows: int, steps: int, seed: int) -> dict[str, torch.Tensor]:
        """Fresh inputs in the program's dtype, exact in float32."""
        generator = torch.Generator().manual_seed(seed)
        found = {}
        for name, item in self.program.inputs.items():
            lead = {"uniform": (), "step": (rows, steps)}.get(item.role, (rows,))
            shape = (*lead, *self.program.type(item.val).shape)
            found[name] = self.draws[name](generator, shape).to(self.program.dtype)
        return found


def random_program(
    seed: int, *, depth: int = 20, max_width: int = 32, dtype: torch.dtype = torch.float32
) -> RandomProgram:
    """A program of ``depth`` blocks of one to eight instructions, its values about ``max_width`` wide at
    most (a few are twice that)."""
    return _Maker(random.Random(seed), max_width, dtype).make(depth)


def _normal(generator: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


class _Maker:
    def __init__(self, rng: random.Random, max_width: int, dtype: torch.dtype) -> None:
        self.rng = rng
        self.max_width = max_width
        high = math.log(max_width + 1)
        self.widths = [
            min(max_width, max(1, round(math.exp(rng.uniform(0, high))))) for _ in range(3)
        ]
        self.p = Program(dtype=dtype)
        self.made = RandomProgram(self.p)
        self.bounds: dict[Any, float] = {}  # about the largest magnitude
        self.exact: set[Any] = set()
        self.floats: list[Val] = []
        self.masks: list[Val] = []
        self.whole: list[tuple[Val, int]] = []  # a single int, how many values it takes

    # -- inputs

    def declare(self, role: str, shape: tuple[int, ...]) -> Val:
        name = f"{role}{len(self.p.inputs)}"
        self.made.draws[name] = _normal
        val = self.p.input(name, role, shape)
        self.bounds[val] = 3.0
        if role in ("step", "context"):
            self.exact.add(val)
        return val

    def declare_int(self, role: str, n: int) -> None:
        name = f"{role}{len(self.p.inputs)}"
        self.made.draws[name] = lambda g, shape: torch.randint(n, shape, generator=g).float()
        self.whole.append((self.p.input(name, role, (), "int"), n))

    def uniform(self, shape: tuple[int, ...], fan_in: int = 1) -> Val:
        name = f"uniform{len(self.p.inputs)}"
        size = 1 / math.sqrt(fan_in)
        self.made.draws[name] = lambda g, shape: (torch.rand(shape, generator=g) * 2 - 1) * size
        val = self.p.input(name, "uniform", shape)
        self.bounds[val] = size
        return val

    # -- values

    def shape(self, v: Val) -> tuple[int, ...]:
        return self.p.type(v).shape

    def emit(self, op: str, *args: Val | float | None, bound: float = 1.0, **attrs: Any) -> Val:
        val = self.p.emit(op, *args, **attrs)
        self.bounds[val] = bound
        if op in ("index", "reshape", "concat") and all(a in self.exact for a in args):
            self.exact.add(val)
        return val

    def move(self, op: str, v: Val, *more: Val, **attrs: Any) -> Val:
        return self.emit(op, v, *more, bound=self.bounds[v], **attrs)

    def keep(self, v: Val) -> None:
        """Into the pool, squashed if it has grown."""
        if self.bounds[v] > 4:
            v = self.emit(self.rng.choice(["tanh", "sigmoid"]), v)
        self.floats.append(v)

    def fit(self, v: Val, n: int) -> Val:
        """As ``[n]``."""
        width = self.p.type(v).width
        if self.shape(v) == (n,):
            return v
        if width == n:
            return self.move("reshape", v, shape=(n,))
        if width > n:
            start = self.rng.randrange(width - n + 1)
            return self.move("index", v, map=tuple(range(start, start + n)), shape=(n,))
        if self.rng.random() < 0.5 or v in self.exact:
            return self.move("index", v, map=tuple(j % width for j in range(n)), shape=(n,))
        return self.dense(self.fit(v, width), n)

    def pick(self, n: int | None = None) -> Val:
        v = self.rng.choice(self.floats[-12:] if self.rng.random() < 0.7 else self.floats)
        return self.fit(v, self.width() if n is None else n)

    def pick_exact(self, n: int) -> Val:
        return self.fit(self.rng.choice([v for v in self.floats if v in self.exact]), n)

    def width(self) -> int:
        return self.rng.choice(self.widths)

    def grouped(self, exact: bool = False) -> Val:
        """``[n]`` or ``[g, n]``."""
        g = self.rng.choice([1, 2, 3, 4])
        n = max(1, min(self.width(), self.max_width // g))
        flat = (self.pick_exact if exact else self.pick)(g * n)
        return flat if self.rng.random() < 0.3 else self.move("reshape", flat, shape=(g, n))

    def other(self, n: int) -> Val | float:
        """The second operand of an elementwise op on ``[n]``."""
        kind = self.rng.randrange(6)
        if kind == 0:
            return round(self.rng.uniform(-1.5, 1.5), 2)
        if kind == 1:
            return self.uniform((n,))
        if kind == 2:
            return self.uniform(self.rng.choice([(), (1,)]))
        if kind == 3:
            one = self.pick(1)
            return one if self.rng.random() < 0.5 else self.move("reshape", one, shape=())
        return self.pick(n)

    def either_way(self, x: Val, y: Val | float) -> tuple[Any, Any]:
        return (x, y) if self.rng.random() < 0.5 else (y, x)

    def positive(self, v: Val) -> Val:
        b = self.bounds[v] ** 2
        return self.emit("add", self.emit("square", v, bound=b), 0.5, bound=b + 0.5)

    def modest(self, v: Val) -> Val:
        """Within about two."""
        return v if self.bounds[v] <= 2 else self.emit("tanh", v)

    def mask(self, n: int) -> Val:
        """Bools, ``[n]`` or a single one."""
        if self.masks and self.rng.random() < 0.5:
            v = self.rng.choice(self.masks)
            if self.shape(v) in ((n,), (1,)):
                return v
        n = self.rng.choice([1, n])
        other = self.rng.choice([0.0, 0.5, self.pick_exact(n)])
        v = self.emit(self.rng.choice(COMPARISONS), self.pick_exact(n), other)
        if self.rng.random() < 0.3:
            v = self.emit("not", v)
        elif self.rng.random() < 0.4:
            more = self.emit("gt", self.pick_exact(n), 0.1)
            v = self.emit(self.rng.choice(["and", "or", "xor"]), v, more)
        self.masks.append(v)
        return v

    def index(self, members: int) -> Val:
        """A single int below ``members``."""
        there = [v for v, n in self.whole if n == members]
        if there and self.rng.random() < 0.7:
            return self.rng.choice(there)
        v = self.emit(self.rng.choice(["argmax", "argmin"]), self.pick_exact(members))
        self.whole.append((v, members))
        return v

    # -- matrices

    def act(self) -> dict[str, Any]:
        if self.rng.random() < 0.4:
            return {}
        act = self.rng.choice(ACTIVATIONS)
        return {"act": act, "act_params": PARAMETERS.get(act)}

    def dense(self, x: Val, n: int) -> Val:
        k = self.shape(x)[-1]
        layout = self.rng.choice(["nk", "kn"])
        w = self.uniform((n, k) if layout == "nk" else (k, n), k)
        b = self.uniform((n,)) if self.rng.random() < 0.7 else None
        return self.emit("linear", x, w, b, layout=layout, bound=self.bounds[x] + 1, **self.act())

    def many(self, op: str, x: Val, g: int, *more: Val) -> Val:
        k, n = self.shape(x)[-1], max(1, self.width() // g)
        layout = self.rng.choice(["nk", "kn"])
        w = self.uniform((g, n, k) if layout == "nk" else (g, k, n), k)
        b = self.uniform((g, n)) if self.rng.random() < 0.7 else None
        bound = self.bounds[x] + 1
        return self.emit(op, x, w, b, *more, layout=layout, bound=bound, **self.act())

    # -- blocks

    def block_linear(self) -> Val:
        return self.dense(self.grouped() if self.rng.random() < 0.3 else self.pick(), self.width())

    def block_grouped_linear(self) -> Val:
        x = self.grouped()
        g = self.shape(x)[0] if len(self.shape(x)) == 2 else self.rng.choice([1, 2, 3])
        return self.many("grouped_linear", x, g)

    def block_member_linear(self) -> Val:
        members = self.rng.choice([1, 2, 5])
        return self.many("member_linear", self.pick(), members, self.index(members))

    def block_unary(self) -> Val:
        op = self.rng.choice(list(UNARY))
        x = self.grouped(exact=op in JUMPS)
        b = self.bounds[x]
        if op in ("log", "sqrt", "rsqrt", "reciprocal"):
            return self.emit(op, self.positive(x), bound=max(2.0, b))
        if op == "log1p":
            return self.emit(op, self.emit("square", x), bound=b)
        if op in ("exp", "expm1"):
            return self.emit(op, self.modest(x), bound=7.0)
        if op in JUMPS:
            v = self.emit(op, x, bound=b + 1)
            return self.emit("cast", v, kind="float") if self.p.type(v).kind == "bool" else v
        bound = b * b if op == "square" else max(b, 1.0)
        return self.emit(op, x, bound=bound, **PARAMETERS.get(op, {}))

    def block_binary(self) -> Val:
        x = self.pick()
        n = self.shape(x)[0]
        y = self.other(n)
        bx, by = self.bounds[x], self.bounds.get(y, 1.5)
        op = self.rng.choice(
            [*("add", "sub", "mul", "div", "pow"), "maximum", "minimum", "clamp_min", "clamp_max"]
        )
        if op == "div":
            below = self.positive(self.pick(self.rng.choice([1, n])))
            above: Val | float = self.rng.choice([x, 1.0, self.uniform((n,))])
            return self.emit(op, above, below, bound=max(1.0, 2 * bx))
        if op == "pow":
            base = self.positive(self.modest(x))
            if self.rng.random() < 0.5:
                return self.emit(
                    op, base, self.rng.choice([2.0, 3.0, 0.5, -1.0, 0.0, 1.0]), bound=20
                )
            exponent = self.modest(self.pick(n))
            return self.emit(op, self.rng.choice([base, 1.5]), exponent, bound=20)
        bound = {"mul": bx * by, "add": bx + by, "sub": bx + by}.get(op, max(bx, by))
        return self.emit(op, *self.either_way(x, y), bound=bound)

    def block_where(self) -> Val:
        x = self.pick()
        n = self.shape(x)[0]
        y = self.other(n)
        bound = max(self.bounds[x], self.bounds.get(y, 1.5))
        return self.emit("where", self.mask(n), *self.either_way(x, y), bound=bound)

    def block_cast(self) -> Val:
        if self.rng.random() < 0.5:
            return self.emit("cast", self.mask(self.width()), kind="float")
        whole = self.emit("cast", self.pick_exact(self.width()), kind="int")
        return self.emit("cast", self.emit("add", whole, whole), kind="float", bound=6.0)

    def block_reduce(self) -> Val:
        x = self.grouped()
        op = self.rng.choice(["sum", "mean", "max", "min", "logsumexp"])
        n, b = self.shape(x)[-1], self.bounds[x]
        if op == "sum":
            return self.emit("mul", self.emit(op, x, bound=n * b), 1 / n, bound=b)
        return self.emit(op, x, bound=b + math.log(n))

    def block_softmax(self) -> Val:
        op = self.rng.choice(["softmax", "log_softmax"])
        x = self.grouped()
        return self.emit(op, x, bound=1.0 if op == "softmax" else 2 * self.bounds[x] + 3)

    def block_layer_norm(self) -> Val:
        x = self.grouped()
        n = self.shape(x)[-1]
        w = self.uniform((n,)) if self.rng.random() < 0.7 else None
        b = self.uniform((n,)) if self.rng.random() < 0.7 else None
        return self.emit("layer_norm", x, w, b, eps=self.rng.choice([1e-3, 0.1]), bound=4.0)

    def block_one_hot(self) -> Val:
        x = self.grouped(exact=True)
        i = self.emit(self.rng.choice(["argmax", "argmin"]), x)
        return self.emit("one_hot", i, n=self.shape(x)[-1])

    def block_take(self) -> Val:
        m, g = self.rng.choice([1, 2, 4]), self.rng.choice([1, 2])
        n = max(1, self.width() // (m * g))
        if self.rng.random() < 0.5:
            i = self.index(m)
            shape: tuple[int, ...] = (m, n)
        else:
            i = self.emit("argmax", self.move("reshape", self.pick_exact(g * m), shape=(g, m)))
            shape = (g, m, n)
        x = self.move("reshape", self.pick(math.prod(shape)), shape=shape)
        v = self.move("take", x, i)
        return v if self.rng.random() < 0.5 else self.move("put", v, i, m=m)

    def block_index(self) -> Val:
        x = self.grouped()
        width, n = self.p.type(x).width, self.width()
        kind = self.rng.randrange(4)
        if kind == 0:
            add = tuple(self.rng.randrange(n) for _ in range(width))
            bound = self.bounds[x] * (1 + width / n)
            return self.emit("index_add", x, map=add, shape=(n,), bound=bound)
        if kind == 1:
            order = tuple(self.rng.sample(range(width), width))
            return self.move("index", x, map=order, shape=self.shape(x))
        if kind == 2:
            return self.move(
                "index", x, map=tuple(j // 2 for j in range(2 * width)), shape=(width, 2)
            )
        some = tuple(self.rng.randrange(width) for _ in range(n))
        return self.move("index", x, map=some, shape=(n,))

    def block_concat(self) -> Val:
        parts = [self.pick(max(1, self.width() // 3)) for _ in range(self.rng.randint(1, 3))]
        if self.rng.random() < 0.3:
            parts.append(self.mask(1))
        return self.emit("concat", *parts, bound=max(self.bounds[v] for v in parts))

    def block_fill(self) -> Val:
        value = round(self.rng.uniform(-2, 2), 2)
        shape = self.rng.choice([(), (self.width(),)])
        return self.emit("fill", value=value, shape=shape, kind="float", bound=2.0)

    def block_row(self) -> Val:
        u = self.uniform((self.width(),))
        return self.emit("row", u, bound=self.bounds[u])

    def block_gates(self) -> Val:
        """A GRU-like cell."""
        n = self.width()
        x = self.dense(self.pick(), 2 * n)
        gate, new = (
            self.move("index", x, map=tuple(range(i * n, (i + 1) * n)), shape=(n,)) for i in (0, 1)
        )
        gate, new = self.emit("sigmoid", gate), self.emit("tanh", new)
        old = self.pick(n)
        bound = self.bounds[old] + 1
        change = self.emit("mul", gate, self.emit("sub", new, old, bound=bound), bound=bound)
        return self.emit("add", old, change, bound=bound)

    # -- all of it

    def make(self, depth: int) -> RandomProgram:
        rng, p = self.rng, self.p
        for role, low, high in (("carry", 1, 3), ("step", 1, 2), ("context", 0, 1)):
            for _ in range(rng.randint(low, high)):
                self.floats.append(self.declare(role, (self.width(),)))
            if rng.random() < 0.4:
                self.declare_int(role, rng.choice([1, 2, 4, 5]))
        given = len(self.floats)
        for _ in range(depth):
            v = getattr(self, f"block_{rng.choice(BLOCKS)}")()
            self.keep(v)
        carries = [i for i in p.inputs.values() if i.role == "carry"]
        for item in carries:
            if rng.random() < 0.15:
                continue  # stays what it is
            p.carries[item.name] = (
                self.next_int(item.val)
                if p.type(item.val).kind == "int"
                else self.next_float(item.val)
            )
        found = rng.sample(self.floats[given:], min(depth, rng.randint(1, 4)))
        p.outputs = {f"out{k}": v for k, v in enumerate(found)}
        if rng.random() < 0.5:
            p.outputs["root"] = carries[0].val
        if self.masks and rng.random() < 0.5:
            p.outputs["mask"] = rng.choice(self.masks)
        p.finals = [i.name for i in carries if rng.random() < 0.7]
        p.checks = [self.emit("isfinite", rng.choice(self.floats))]
        return self.made

    def next_float(self, v: Val) -> Val:
        new = self.pick(self.p.type(v).width)
        if self.rng.random() < 0.8:
            return self.emit("tanh", self.emit("add", self.emit("mul", v, 0.5), new))
        return self.modest(new)

    def next_int(self, v: Val) -> Val:
        other = self.index(next(n for w, n in self.whole if w == v))
        if self.rng.random() < 0.5:
            return other
        return self.emit("where", self.move("reshape", self.mask(1), shape=()), v, other)
