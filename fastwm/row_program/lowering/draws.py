"""Random ops: drawn by torch itself, step after step as eager does, and handed to the program as inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastwm.row_program.lowering.errors import NotLowerable
from fastwm.row_program.lowering.layout import Atom, Dims, Laid, inner_atoms
from fastwm.row_program.lowering.registry import Call, lowers
from fastwm.row_program.noise import Law
from fastwm.step_graph import Meta, Value

if TYPE_CHECKING:
    from fastwm.row_program.lowering.step import StepLowering as Step

__all__ = ["Draw", "placements"]


@dataclass
class Draw:
    """One random op of the step.

    Attributes:
        name: of the program's step input, ``("draw", i)``; None when nobody reads it. It must be drawn all
            the same, for what is drawn after it.
        shape, dtype: of one step's noise, as eager draws it.
        plain: the noise is ``[*batch, *inner]``: rows need no rearranging.
        inner: shape of the program's input.
        sample: gives a step's noise, in eager's shape, by the call that eager makes.
        rows: the same as the program takes it: ``[rows, *inner]``.
        fill: where there is such a call: writes the same noise into a contiguous tensor of ``shape``, which
            lies in memory as the program's ``[rows, *inner]``.
        law: how the numbers are distributed, where a kernel may draw them by itself: every row has its own,
            from torch's own generator.
    """

    name: Any
    shape: tuple[int, ...]
    dtype: torch.dtype
    plain: bool
    inner: tuple[int, ...]
    sample: Callable[[], torch.Tensor]
    rows: Callable[[torch.Tensor], torch.Tensor]
    fill: Callable[[torch.Tensor], Any] | None = None
    law: Law | None = None


def placements(shape: Sequence[int], batch: Sequence[Atom | None]) -> Iterator[Dims]:
    """Where the batch may lie in noise of that shape, likeliest first; nowhere, last of all.

    Any placement under which the whole step keeps to its rows is right, since each op is held to it.
    """
    atoms = [a for a in batch if a is not None]

    def inner(n: int) -> tuple[Atom, ...]:
        return (Atom("inner", n),) if n > 1 else ()

    if atoms:
        real = [i for i, n in enumerate(shape) if n > 1]
        for start in range(len(real) - len(atoms) + 1):
            places = real[start : start + len(atoms)]
            if [shape[i] for i in places] == [a.size for a in atoms]:
                yield tuple(
                    (atoms[places.index(i)],) if i in places else inner(n)
                    for i, n in enumerate(shape)
                )
        rows = math.prod(a.size for a in atoms)
        for place in real:
            n = shape[place]
            if n % rows == 0 and (n > rows or len(atoms) > 1):
                rest = inner(n // rows)
                for merged in dict.fromkeys([(*atoms, *rest), (*rest, *atoms)]):
                    yield tuple(merged if i == place else inner(m) for i, m in enumerate(shape))
    yield tuple(inner(n) for n in shape)


def drawn(
    s: Step, make: Callable[[], torch.Tensor], meta: Meta, known: Dims | None, kind: str,
    bound: float | None = None, limits: tuple[float, float] | None = None,
    fill: Callable[[torch.Tensor], Any] | None = None, law: Law | None = None,
) -> Laid:  # fmt: skip
    """A step input for noise; ``known``: where its batch lies, else the step tries placements."""
    shape = tuple(meta.shape)
    if math.prod(shape) == 0:
        raise NotLowerable("a random op that draws nothing")
    if known is None or not any(a.kind == "batch" for d in known for a in d):
        dims = s.place(shape)
    else:
        dims = tuple(
            tuple(a if a.kind == "batch" else Atom("inner", a.size) for a in d) for d in known
        )
    order = inner_atoms(dims)
    inner = tuple(
        math.prod(a.size for a in d if a.kind == "inner")
        for d in dims
        if not d or any(a.kind == "inner" for a in d)
    )
    lead = len(s.b.batch)
    plain = dims[:lead] == s.b.batch_dims and not any(
        a.kind == "batch" for d in dims[lead:] for a in d
    )
    inner = shape[lead:] if plain else inner
    name = ("draw", len(s.draws))
    val = s.b.program.input(name, "step", inner, kind)
    s.b.quiet.add(val.index)
    if limits is not None:
        s.b.ranges[val.index] = limits
    s.draws.append(Draw(name, shape, meta.dtype, plain, inner, make, _arranger(s, dims, inner)))
    laid = Laid(val, dims, order, kind)
    _fill(s.draws[-1], fill)
    if {a for d in dims for a in d if a.kind == "batch"} == {a for a in s.b.batch if a is not None}:
        s.draws[-1].law = law
    return s.b.bounded(laid, bound) if kind == "int" else laid


def _arranger(
    s: Step, dims: Dims, inner: tuple[int, ...]
) -> Callable[[torch.Tensor], torch.Tensor]:
    atoms = [a for d in dims for a in d]
    batch = [a for a in s.b.batch if a is not None]
    rows = math.prod(a.size for a in batch)
    here = [a for a in batch if a in atoms]
    perm = [atoms.index(a) for a in (*here, *inner_atoms(dims))]
    sizes = [a.size for a in atoms]
    lead = [a.size if a in here else 1 for a in batch]
    full = [a.size for a in batch]
    rest = [a.size for a in inner_atoms(dims)]

    def arrange(noise: torch.Tensor) -> torch.Tensor:
        noise = noise.reshape(sizes).permute(perm).reshape((*lead, *rest)).expand((*full, *rest))
        return noise.reshape((rows, *inner))

    return arrange


@lowers("normal", "uniform", "exponential", "bernoulli", "random", "cauchy", "log_normal", "geometric",
        "randn_like", "rand_like", "randint_like", "randn", "rand", "randint")  # fmt: skip
def _draw(s: Step, c: Call) -> Laid:
    meta = c.out[0]
    assert meta is not None
    tensors = [v for v in c.given.values() if isinstance(v, Laid)]
    if c.name == "normal" and not c.op.mutates:
        return _normal(s, c, meta)
    if c.name == "bernoulli" and not (c.op.mutates or isinstance(c.get("p"), float)):
        return _bernoulli(s, c, meta, c["self"])
    if c.name == "bernoulli" and isinstance(c.get("p"), Laid):
        return _bernoulli(s, c, meta, c["p"])
    if len(tensors) > (c.name not in ("randn", "rand", "randint")):
        raise NotLowerable(f"aten.{c.name} with parameters that the step computes")
    known = tensors[0].dims if tensors else None
    make = s.redraw(c, meta)
    if meta.dtype.is_floating_point and meta.dtype is not s.floats:
        return s.unreadable(c, meta, make)
    kind, bound, limits = s.kind(meta), None, None
    if kind == "int":
        high = c.get("high", c.get("to"))
        if high is None:
            raise NotLowerable(f"aten.{c.name} of any integer")
        low = c.get("low", c.get("from", 0)) or 0
        bound, limits = float(max(abs(high), abs(low))), (float(low), high - 1.0)
    return drawn(s, make, meta, known, kind, bound, limits, _filler(s, c, meta), _law(c))


def _law(c: Call) -> Law | None:
    if c.get("generator") is not None:
        return None
    if c.name in ("randn", "randn_like"):
        return Law("normal", 0.0, 1.0)
    if c.name in ("rand", "rand_like"):
        return Law("uniform", 0.0, 1.0)
    names = {"normal": ("mean", "std"), "uniform": ("from", "to"), "exponential": ("lambd",)}
    given = [c.get(name) for name in names.get(c.name, ())]
    if not given or not all(isinstance(v, (int, float)) for v in given):
        return None
    return Law(c.name, *map(float, given))


def _fill(draw: Draw, fill: Callable[[torch.Tensor], Any] | None) -> None:
    """Keep ``fill`` if the noise need only be seen in another shape to be what the program takes."""
    if fill is not None:
        order = torch.arange(math.prod(draw.shape))
        if torch.equal(draw.rows(order.reshape(draw.shape)).flatten(), order):
            draw.fill = fill


def _filler(s: Step, c: Call, meta: Meta) -> Callable[[torch.Tensor], Any] | None:
    """The call that draws the same numbers into memory that is there."""
    generator = c.op.kwargs.get("generator")
    on_like = c.op.mutates or c.name.endswith("_like")
    if on_like and not s.like(c.op.args[0], tuple(meta.shape), meta.dtype)().is_contiguous():
        return None
    if c.name in ("randn", "randn_like", "rand", "rand_like"):
        method = getattr(torch.Tensor, "normal_" if "randn" in c.name else "uniform_")
        return lambda out: method(out, generator=generator)
    if c.name in ("normal", "uniform", "exponential") and c.op.mutates:
        rest = c.op.args[1:]
        if any(isinstance(a, Value) for a in rest):
            return None
        named = getattr(torch.Tensor, f"{c.name}_")
        kwargs = {k: v for k, v in c.op.kwargs.items() if v is not None}
        return lambda out: named(out, *rest, **kwargs)
    return None


def _normal(s: Step, c: Call, meta: Meta) -> Laid:
    """``normal(mean, std)``: in torch, noise times std plus mean, in this order."""
    mean, std = c["mean"], c["std"]
    generator = c.get("generator")
    shape = tuple(meta.shape)

    def make() -> torch.Tensor:
        return torch.randn(shape, dtype=meta.dtype, device=meta.device, generator=generator)

    operands = [o for o in (mean, std) if isinstance(o, Laid)]
    law = None if generator is not None else Law("normal", 0.0, 1.0)
    noise = drawn(s, make, meta, s.dims_of(operands, shape), "float", law=law)
    if isinstance(std, Laid):
        s.check(s.b.elementwise("ge", std, 0.0))
    return s.arith("add", s.arith("mul", noise, std), mean)


def _bernoulli(s: Step, c: Call, meta: Meta, p: Laid) -> Laid:
    """On a CPU ``bernoulli(p)`` is ``rand < p``, number for number."""
    if meta.device.type != "cpu":
        raise NotLowerable(f"bernoulli of computed probabilities on {meta.device.type}")
    if p.kind != "float":
        raise NotLowerable("bernoulli of probabilities that are no floats")
    s.refuse_ties("bernoulli")
    shape, dtype = tuple(meta.shape), s.b.program.dtype
    generator = c.get("generator")

    def make() -> torch.Tensor:
        return torch.rand(shape, dtype=dtype, generator=generator)

    law = None if generator is not None else Law("uniform", 0.0, 1.0)
    where = s.dims_of([p], shape)
    uniform = drawn(s, make, Meta(meta.shape, dtype, meta.device), where, "float", law=law)
    s.check(s.b.elementwise("ge", p, 0.0))
    s.check(s.b.elementwise("le", p, 1.0))
    out = s.b.elementwise("lt", uniform, p)
    return s.b.cast(out, s.kind(meta))


@lowers("multinomial")
def _multinomial(s: Step, c: Call) -> Laid:
    """One sample: the largest of ``p / exponential noise``, as torch itself draws it."""
    p, meta = c["self"], c.out[0]
    assert meta is not None
    if c["num_samples"] != 1:
        raise NotLowerable("multinomial with several samples")
    if meta.device.type != "cpu":
        raise NotLowerable(f"multinomial on {meta.device.type}")
    shape, dtype = p.shape, s.b.program.dtype
    generator = c.get("generator")
    empty = s.like(c.op.args[0], shape, dtype)

    def make() -> torch.Tensor:
        return empty().exponential_(1, generator=generator)

    def fill(out: torch.Tensor) -> Any:
        return out.exponential_(1, generator=generator)

    p = s.b.as_row(p)
    noise = drawn(
        s, make, Meta(torch.Size(shape), dtype, meta.device), s.dims_of([p], shape), "float",
        fill=fill if empty().is_contiguous() else None,
        law=None if generator is not None else Law("exponential", 1.0),
    )  # fmt: skip
    last = len(p.dims) - 1
    s.check(s.b.unary("isfinite", p))
    s.check(s.b.elementwise("ge", p, 0.0))
    s.check(s.b.elementwise("gt", s.reduced("sum", p, [last], True), 0.0))
    out = s.reduced("argmax", s.b.elementwise("div", p, noise), [last], True)
    return s.b.bounded(out, float(shape[-1]))
