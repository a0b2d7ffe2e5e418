"""The walk over a step's ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fastwm.row_program.kinds import dtype_name, dtype_of, kind_of
from fastwm.row_program.lowering import (  # noqa: F401  (registers the ops)
    draws,
    elementwise,
    factories,
    indexing,
    movement,
    products,
    reductions,
)  # fmt: skip
from fastwm.row_program.lowering.builder import Builder, Operand
from fastwm.row_program.lowering.draws import Draw, placements
from fastwm.row_program.lowering.elementwise import ELEMENTWISE
from fastwm.row_program.lowering.errors import NotLowerable, RowsMix
from fastwm.row_program.lowering.functions import call_function
from fastwm.row_program.lowering.layout import (
    Atom,
    Dims,
    Fill,
    Fixed,
    Laid,
    align,
    inner_atoms,
    repeats,
)  # fmt: skip
from fastwm.row_program.lowering.prologue import Leaf
from fastwm.row_program.lowering.registry import HANDLERS, LAYOUT_ONLY, Call
from fastwm.row_program.lowering.strides import row_major, strides_of
from fastwm.row_program.program import Val
from fastwm.step_graph import Meta, Op, StepGraph, Value, map_values

__all__ = ["StepLowering"]

_IDENTITY = {"detach", "alias", "lift_fresh", "view", "_unsafe_view", "reshape"}
_RESHAPES = {"squeeze_", "unsqueeze_", "t_", "transpose_"}
_LARGEST_LITERAL = 1 << 20


class StepLowering:
    """Lowers one step.

    Args:
        floats: dtype of the graph's floats. The program computes with bfloat16 ones in float32, and rounds
            none of them: what is rounded is what the caller is given.
        choices: which placement to take for each draw whose batch could lie in several places.
    """

    def __init__(
        self, graph: StepGraph, dim: int, floats: torch.dtype, choices: Sequence[int] = ()
    ) -> None:
        self.graph = graph
        self.dim = dim
        first = next(iter(graph.inputs.values()))
        batch = graph.metas[first.index].shape[:dim]
        self.floats = floats
        dtype = torch.float32 if floats is torch.bfloat16 else floats
        self.b = Builder(dtype, [t for _, t in graph.constants], batch)
        self.draws: list[Draw] = []
        self.choices = choices
        self.options: list[int] = []  # how many placements each such draw has
        self.env: dict[int, Laid] = {}
        self.stale: dict[int, str] = {}
        self.parents: dict[int, tuple[int, int, int, bool]] = {}
        self.validated: dict[int, Laid] = {}
        self._strides: dict[int, tuple[int, ...] | None] | None = None
        self.likes = False
        self.unread: set[int] = set()
        # What is known of these is their shape at the end.
        self.reshaped = {
            v.index for op in graph.ops for v in op.mutates if op.name.split(".")[0] in _RESHAPES
        }

    # -- running

    def start(self, roles: dict[Any, str]) -> None:
        for name, v in self.graph.inputs.items():
            meta = self.graph.metas[v.index]
            kind = self.kind(meta, f"input {name}")
            inner = tuple(meta.shape[self.dim :])
            key = name if name[0] == "feed" else ("in", name)
            val = self.b.program.input(key, roles[name], inner, kind)
            dims = (*self.b.batch_dims, *(((Atom("inner", n),) if n > 1 else ()) for n in inner))
            laid = Laid(val, dims, inner_atoms(dims), kind)
            self.env[v.index] = laid
        for i, (v, tensor) in enumerate(self.graph.constants):
            if v.index in self.graph.fresh:
                self.env[v.index] = self.b.fixed(tensor)
            else:
                kind = self.kind(Meta.of(tensor), "a parameter or buffer", fixed=True)
                self.env[v.index] = self.b.node(i, tuple(tensor.shape), kind)

    def run(self) -> None:
        for op in self.graph.ops:
            try:
                self.lower(op)
            except NotLowerable as error:
                text = str(error)
                if op.name.split(".")[0] not in text:
                    text = f"aten.{op.name}: {text}"
                raise type(error)(text) from None

    def lower(self, op: Op) -> None:
        outs = [None if o is None else self.graph.metas[o.index] for o in op.outputs]
        if not isinstance(op.target, torch._ops.OpOverload):
            found: Any = call_function(self, op, list(map_values(op.args, self.read)))
            self.store(op, [found])
            return
        if op.name.split(".")[0] == "_is_all_true":
            (value,) = op.inputs()
            assert op.outputs[0] is not None
            self.validated[op.outputs[0].index] = self.read(value)
            return
        call = self.call(op, outs)
        found = self.apply(call)
        self.store(op, list(found) if isinstance(found, (list, tuple)) else [found])

    def call(self, op: Op, outs: list[Meta | None]) -> Call:
        assert isinstance(op.target, torch._ops.OpOverload)
        schema = op.target._schema
        name = schema.name.partition("::")[2]
        if op.mutates and name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        given: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if argument.name == "out" or (argument.is_out and argument.kwarg_only):
                continue
            if i < len(op.args):
                value = op.args[i]
            elif argument.name in op.kwargs:
                value = op.kwargs[argument.name]
            elif argument.has_default_value():
                value = argument.default_value
            else:
                continue
            given[argument.name] = map_values(value, self.read)
        return Call(op, name, given, outs)

    def apply(self, c: Call) -> Any:
        handler = HANDLERS.get(c.name)
        tensors = [t for v in c.given.values() for t in _laids(v)]
        rows = any(t.is_row for t in tensors)
        if rows or c.op.draws or c.name in LAYOUT_ONLY:
            if handler is None:
                raise NotLowerable(f"aten.{c.op.name}: no row-wise form")
            return handler(self, c)
        if all(isinstance(t.ref, Fill) for t in tensors):
            return self.known(c)
        return self.computed(c)

    def store(self, op: Op, found: list[Laid | None]) -> None:
        for position, (v, laid) in enumerate(zip(op.outputs, found, strict=False)):
            if v is None or laid is None:
                continue
            meta = self.graph.metas[v.index]
            if v.index in self.unread:
                continue
            if laid.shape != tuple(meta.shape) and v.index not in self.reshaped:
                raise NotLowerable(f"a result of shape {laid.shape} for {tuple(meta.shape)}")
            kind = self.kind(meta, fixed=not laid.is_row)
            if laid.kind != kind:
                laid = self.b.cast(laid, kind) if "float" in (kind, laid.kind) else laid
                laid = replace(laid, kind=kind)
            if op.detached:
                laid = self.detached(laid)
            if v in op.mutates:
                self.write(v, laid)
            else:
                self.env[v.index] = laid
                for source in op.inputs():
                    if self.graph.storage.get(source.index) == self.graph.storage.get(v.index):
                        base = op.name.split(".")[0]
                        same = (
                            base in _IDENTITY and self.graph.metas[source.index].shape == meta.shape
                        )
                        self.parents[v.index] = (source.index, id(op), position, same)
                        break

    def write(self, v: Value, laid: Laid) -> None:
        """An in-place write: the value and all that show the same elements are the new ones."""
        memory = self.graph.storage.get(v.index)
        for index in self.env:
            if index == v.index or self.graph.storage.get(index) != memory:
                continue
            relation = self.relation(index, v.index)
            if relation == "same":
                self.env[index] = laid
            elif relation != "apart":
                self.stale[index] = "a value that another view of it wrote in place"
        self.env[v.index] = laid
        self.stale.pop(v.index, None)

    def relation(self, a: int, b: int) -> str:
        def chain(index: int) -> list[tuple[int, int, int, bool]]:
            out = []
            while index in self.parents:
                out.append(self.parents[index])
                index = self.parents[index][0]
            return out

        ups, downs = chain(a), chain(b)
        roots_a = [a, *(p[0] for p in ups)]
        roots_b = [b, *(p[0] for p in downs)]
        shared = next((r for r in roots_a if r in roots_b), None)
        if shared is None:
            return "unknown"
        to_a, to_b = ups[: roots_a.index(shared)], downs[: roots_b.index(shared)]
        if all(same for *_, same in (*to_a, *to_b)):
            return "same"
        if to_a and to_b and to_a[-1][1] == to_b[-1][1] and to_a[-1][2] != to_b[-1][2]:
            return "apart"
        return "overlap"

    # -- reading

    def read(self, v: Value) -> Laid:
        if v.index in self.stale:
            raise NotLowerable(f"reads {self.stale[v.index]}")
        if v.index in self.validated:
            raise NotLowerable("reads whether all rows hold something")
        laid = self.env[v.index]
        # An int from outside may be larger than the program can hold; computed ones are watched.
        if laid.kind == "int" and laid.bound is None and laid.is_row:
            laid = self.env[v.index] = self.b.bounded(laid, None)
        return laid

    def kind(self, meta: Meta | None, what: str = "a value", fixed: bool = False) -> str:
        assert meta is not None
        dtype = meta.dtype
        allowed = (self.floats, self.b.program.dtype, torch.bool, torch.int64, torch.int32)
        if dtype not in allowed and not (fixed and dtype.is_floating_point and dtype.itemsize > 2):
            raise NotLowerable(
                f"{what} of dtype {dtype_name(dtype)} in a step of {dtype_name(self.b.program.dtype)}"
            )
        return kind_of(dtype)

    def refuse_ties(self, what: str) -> None:
        """A choice among bfloat16 values, where ties are common, hangs on how eager rounded them."""
        if self.floats is torch.bfloat16:
            raise NotLowerable(
                f"{what} of bfloat16 values, whose ties eager breaks by its roundings"
            )

    # -- pieces for the ops

    def arith(self, op: str, a: Operand, b: Operand) -> Laid:
        """Arithmetic with torch's kinds: bools add up to "or", ints are watched for their size."""
        kinds = [_kind(o) for o in (a, b)]
        if kinds == ["bool", "bool"]:
            logic = {"add": "or", "mul": "and", "maximum": "or", "minimum": "and"}.get(op)
            if logic is None:
                raise NotLowerable(f"{op} of bools")
            return self.b.elementwise(logic, a, b, kind="bool")
        if "float" in kinds:
            return self.b.elementwise(op, a, b, kind="float")
        out = self.b.elementwise(op, a, b, kind="int")
        first, second = (_bound(o) for o in (a, b))
        if first is None or second is None:
            return self.b.bounded(out, None)
        most = {"mul": first * second}.get(op, first + second)
        return self.b.bounded(out, most)

    def most(self, *operands: Operand) -> float | None:
        """How large ints taken from one or the other can be."""
        bounds = [_bound(o) for o in operands]
        return None if None in bounds else max(b for b in bounds if b is not None)

    def reduced(self, op: str, x: Laid, dims: Sequence[int], keep: bool) -> Laid:
        return reductions.reduced(self, op, x, dims, keep)

    def narrowed(self, x: Laid, dim: int, start: int, length: int) -> Laid:
        return movement.narrowed(self, x, dim, start, length)

    def view(self, x: Laid, shape: tuple[int, ...]) -> Laid:
        if isinstance(x.ref, Fill) and not x.atoms("batch"):
            return x.with_dims(repeats(shape))
        return self.b.view(x, shape)

    def detached(self, x: Laid) -> Laid:
        if isinstance(x.ref, Fixed):
            return replace(x, ref=Fixed(x.ref.node, True))
        if not isinstance(x.ref, Val) or x.kind != "float" or x.ref.index in self.b.quiet:
            return x
        return self.b.unary("detach", x)

    def check(self, x: Laid) -> None:
        if isinstance(x.ref, Fill):
            if not x.ref.value:
                raise NotLowerable("an argument check that fails whatever the data")
            return
        val = self.b.as_row(x).ref
        assert isinstance(val, Val)
        if val not in self.b.program.checks:
            self.b.program.checks.append(val)

    # -- constants

    def known(self, c: Call) -> Any:
        """An op on numbers alone: done now."""
        sizes = [math.prod(m.shape) for m in c.out if m is not None]
        if sum(sizes) > _LARGEST_LITERAL:
            raise NotLowerable("a large tensor that the step makes out of numbers")

        def full(tree: Any) -> Any:
            if isinstance(tree, Laid):
                return self._full(tree.shape, tree)
            if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
                return type(tree)(full(i) for i in tree)
            return "cpu" if isinstance(tree, torch.device) else tree

        with torch.no_grad():
            found = _functional(c)(**{k: full(v) for k, v in c.given.items()})
        found = found if isinstance(found, (list, tuple)) else [found]
        out = []
        for tensor in found:
            laid = self.b.fixed(tensor)
            if tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
                value = tensor.flatten()[0].item()
                laid = Laid(Fill(value), repeats(tensor.shape), (), kind_of(tensor.dtype))
            out.append(laid)
        return out

    def computed(self, c: Call) -> Any:
        """An op on constants alone: for the prologue."""
        tensors = [t for v in c.given.values() for t in _laids(v)]
        spread = any(t.atoms("repeat") or t.atoms("batch") for t in tensors)
        if c.name not in ELEMENTWISE and spread:
            # What is alike for all rows already has its place in each of them.
            handler = HANDLERS.get(c.name)
            if handler is None:
                raise NotLowerable(f"aten.{c.op.name}: no row-wise form")
            done = False
            for key, value in c.given.items():
                if isinstance(value, Laid) and not done:
                    c.given[key] = self.b.as_row(value)
                    done = True
                elif isinstance(value, (list, tuple)) and list(_laids(value)) and not done:
                    c.given[key] = [self.b.as_row(t) for t in value]
                    done = True
            return handler(self, c)
        if c.name in ELEMENTWISE:
            _, _, dims = align(tensors, c.name)
            shape = tuple(math.prod(a.size for a in d if a.kind == "inner") for d in dims)
        kwargs = {k: self._leaves(v) for k, v in c.given.items()}
        run = _functional(c)
        frozen = c.op.detached
        out: list[Laid] = []
        for position, meta in enumerate(c.out):
            if meta is None:
                continue
            pick = None if c.op.single else position
            kind = self.kind(meta, fixed=True)
            if c.name in ELEMENTWISE:
                number = self.b.nodes.compute(run, (), kwargs, shape, pick=pick, frozen=frozen)
                out.append(Laid(Fixed(number, frozen), dims, inner_atoms(dims), kind))
            else:
                size = tuple(meta.shape)
                number = self.b.nodes.compute(run, (), kwargs, size, pick=pick, frozen=frozen)
                out.append(self.b.node(number, size, kind, frozen))
        return out

    def _full(self, shape: tuple[int, ...], number: Laid) -> torch.Tensor:
        assert isinstance(number.ref, Fill)
        return torch.full(
            shape, number.ref.value, dtype=dtype_of(number.kind, self.b.program.dtype)
        )

    def _leaves(self, tree: Any) -> Any:
        if isinstance(tree, Laid):
            if isinstance(tree.ref, Fill):
                return Leaf(self.b.nodes.literal(self._full((1,) * len(tree.dims), tree)))
            return self.b.leaf(tree, full=False)
        if isinstance(tree, (list, tuple)) and not isinstance(tree, torch.Size):
            return [self._leaves(i) for i in tree]
        return tree

    def expanded(self, x: Laid) -> Laid:
        """A constant whose repeats are written out, in the prologue."""
        if x.atoms("batch"):
            raise RowsMix("a constant laid out along the batch")
        leaf = self.b.leaf(x, full=True)
        number = self.b.nodes.compute(torch.clone, (leaf,), {}, x.shape)
        return self.b.node(number, x.shape, x.kind, x.ref.frozen)  # type: ignore[union-attr]

    # -- noise

    def place(self, shape: tuple[int, ...]) -> Dims:
        found = list(placements(shape, self.b.batch))
        position = len(self.options)
        self.options.append(len(found))
        return found[self.choices[position] if position < len(self.choices) else 0]

    def dims_of(self, operands: Sequence[Laid], shape: tuple[int, ...]) -> Dims:
        """Where the batch of values lies, once broadcast together."""
        _, _, dims = align([*operands, Laid(Fill(0), repeats(shape), ())])
        return tuple(
            tuple(a if a.kind == "batch" else Atom("inner", a.size) for a in d) for d in dims
        )

    def like(
        self, v: Value, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Callable[[], torch.Tensor]:
        """Makes empty tensors that lie in memory as ``empty_like`` of the value would."""
        if self._strides is None:
            self._strides = strides_of(self.graph)
        stride = self._strides.get(v.index)
        if stride is None:
            raise NotLowerable("noise like a value whose memory layout is unknown")
        self.likes = True
        device = self.graph.metas[v.index].device
        stride = torch.empty_like(torch.empty_strided(shape, stride, device="meta")).stride()
        return lambda: torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def redraw(self, c: Call, meta: Meta) -> Callable[[], torch.Tensor]:
        """The very call that eager makes, on memory of its own."""
        op = c.op
        if not any(isinstance(a, Value) for a in op.args):
            return lambda: op.target(*op.args, **op.kwargs)
        first, rest = op.args[0], op.args[1:]
        shape = tuple(meta.shape)
        given = self.graph.metas[first.index]
        empty = self.like(first, shape, given.dtype)
        return lambda: op.target(empty(), *rest, **op.kwargs)

    def unreadable(self, c: Call, meta: Meta, make: Callable[[], torch.Tensor]) -> Laid:
        """Noise of another dtype: drawn, for what is drawn after it, but not to be read."""
        (v,) = c.op.outputs
        assert v is not None
        self.stale[v.index] = (
            f"noise of dtype {dtype_name(meta.dtype)} in a step of {dtype_name(self.b.program.dtype)}"
        )
        self.unread.add(v.index)
        shape = tuple(meta.shape)
        self.draws.append(Draw(None, shape, meta.dtype, False, shape, make, lambda noise: noise))
        return Laid(Fill(0.0), repeats(shape), ())

    def settle(self, carried: Sequence[Any]) -> None:
        """Checks that need the whole step: noise drawn like a value must lie alike at every step."""
        if not self.likes or self._strides is None:
            return
        for path in carried:
            v = self.graph.outputs["state", path]
            shape = tuple(self.graph.metas[v.index].shape)
            if not row_major(shape, self._strides.get(v.index)):
                raise NotLowerable(
                    f"noise drawn like a value, and {path} changes its memory layout"
                )


def _laids(tree: Any) -> list[Laid]:
    if isinstance(tree, Laid):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _laids(item)]
    return []


def _kind(operand: Operand) -> str:
    if isinstance(operand, Laid):
        return operand.kind
    return type(operand).__name__


def _bound(operand: Operand) -> float | None:
    if not isinstance(operand, Laid):
        return abs(float(operand))
    if operand.kind == "bool":
        return 1.0
    if isinstance(operand.ref, Fill):
        return abs(float(operand.ref.value))
    return operand.bound


def _functional(c: Call) -> Callable[..., Any]:
    """The op itself, or what an in-place one computes."""
    if not c.op.mutates:
        assert isinstance(c.op.target, torch._ops.OpOverload)
        return c.op.target
    return getattr(torch.ops.aten, c.name)
