"""The forward program with what it saves, and the backward program."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastwm.row_program.gradient.activity import active_values, next_value
from fastwm.row_program.gradient.rules import RULES, ZERO
from fastwm.row_program.gradient.tape import choose
from fastwm.row_program.ops import PRODUCTS
from fastwm.row_program.passes.dce import dce
from fastwm.row_program.passes.rewrite import with_args
from fastwm.row_program.program import Arg, Instr, Program, ProgramError, RowType, Val

__all__ = ["Gradient", "Source", "differentiate"]


class Source(NamedTuple):
    """Where a saved value comes from: the forward run's step input or output of that name."""

    kind: str  # "input" or "output"
    name: Any


@dataclass
class Gradient:
    """A program and its backward pass.

    Attributes:
        forward: the program with more outputs: ``("tape", k)``, what it saves.
        backward: to be run from the last step to the first. Its inputs:

            - step ``("tape", k)``; ``("saved", name)``: the step input or the carry of that name, at each
              step; ``("output", name)``: an output of the forward program. See ``saved``.
            - step ``("grad", name)``: the gradient of that output.
            - carry ``("adjoint", name)``: the gradient of that carry at the start of the following step, or
              of that context, summed over the steps so far. Starts at zero, or at the gradient of the
              carry's last value (``final_grads``).
            - context and uniform: the forward program's own.

            Its outputs ``("grad", name)`` are gradients of step inputs, its finals ``("adjoint", name)`` of
            the start and of context, its sums ``("grad", name)`` of uniforms.
        saved: for each ``("tape", k)``, ``("saved", name)`` and ``("output", name)``, where it comes from.
        reached: the inputs among those asked for that get a gradient. That of the others is zero.
    """

    forward: Program
    backward: Program
    saved: dict[Any, Source] = field(default_factory=dict)
    reached: list[Any] = field(default_factory=list)

    @property
    def tape_width(self) -> int:
        """Floats saved per row and step, beside inputs and outputs that are there anyway."""
        return sum(v.width for k, v in self.tape_types().items())

    def sources(self) -> list[Source]:
        """What the backward program reads of the forward run's inputs and outputs."""
        return [
            self.saved.get(name, Source("input", name))
            for name, item in self.backward.inputs.items()
            if name in self.saved or item.role in ("context", "uniform")
        ]

    def tape_types(self) -> dict[Any, RowType]:
        """By name, of the values that are saved in outputs of their own."""
        given = self.backward.inputs
        return {n: self.backward.type(i.val) for n, i in given.items() if n[:1] == ("tape",)}


def differentiate(
    program: Program,
    wrt: Collection[Any],
    output_grads: Collection[Any],
    *,
    final_grads: Collection[Any] = (),
    carry_outputs: Mapping[Any, Any] | None = None,
    budget: float | None = None,
) -> Gradient:
    """The backward pass of a program, as a program to be run in reverse.

    Args:
        wrt: names of the inputs, of any role, whose gradients are wanted.
        output_grads: names of the outputs whose gradients will be given.
        final_grads: names of the carries the gradient of whose value after the last step will be given, as
            the initial value of ``("adjoint", name)``.
        carry_outputs: carry -> the output that holds its value at the start of each step, so that it is not
            saved once more. Outputs that are the carry itself are found without.
        budget: how many floats may be saved per row and step; the backward program recomputes the rest. None:
            no limit, no recomputation. Carries that no output holds are saved in any case.

    Raises:
        ProgramError: an op without a gradient on the way (a second derivative), or names that are not there.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.gradient import differentiate
        >>> p = Program()
        >>> x, w = p.input("x", "carry", (3,)), p.input("w", "uniform", (3, 3))
        >>> p.carries["x"] = p.outputs["next"] = p.emit("linear", x, w, None, layout="nk", act="tanh")
        >>> p.outputs["x"] = x
        >>> print(differentiate(p, wrt=["x", "w"], output_grads=["next"]).backward)
        row program (float32)
          carry   %0 adjoint.x: f[3]
          step    %1 grad.next: f[3]
          step    %2 saved.x: f[3]
          uniform %3 w: f[3, 3]
          step    %4 output.next: f[3]
          %5: f[3] = add(%0, %1)
          %6: f[3] = tanh_grad(%5, %4)
          %7: f[3] = linear(%6, %3, None, layout=kn)
          outer(%2, %6, target=grad.w, layout=nk)
          next adjoint.x = %7
          final adjoint.x
          sum grad.w: [3, 3]
    """
    _check(program, wrt, output_grads, final_grads, carry_outputs or {})
    plain, fused = _split_activations(program)
    active = active_values(plain, wrt, output_grads, final_grads)
    adjoint = Adjoint(plain, active)
    reached = adjoint.run(wrt, output_grads, final_grads)
    needs = adjoint.needs(_at_hand(plain))
    tape = _Tape(plain, fused, needs, dict(carry_outputs or {}), budget)
    return Gradient(tape.forward(), tape.backward(adjoint), tape.saved, reached)


def _check(
    program: Program,
    wrt: Collection[Any],
    output_grads: Collection[Any],
    final_grads: Collection[Any],
    carry_outputs: Mapping[Any, Any],
) -> None:
    for name in wrt:
        if name not in program.inputs:
            raise ProgramError(f"no input {name!r} to differentiate with respect to")
        if program.type(program.inputs[name].val).kind != "float":
            raise ProgramError(f"input {name!r} is no float: it has no gradient")
    for name in (*output_grads, *carry_outputs.values()):
        if name not in program.outputs:
            raise ProgramError(f"no output {name!r}")
    for name in (*final_grads, *carry_outputs):
        if name not in program.inputs or program.inputs[name].role != "carry":
            raise ProgramError(f"no carry {name!r}")


def _split_activations(program: Program) -> tuple[Program, dict[int, Instr]]:
    """The program with each matrix's activation as an instruction of its own, and by number of the value
    between the two, the instruction they were. All other values keep their numbers."""
    plain = replace(program, instrs=[], outputs=dict(program.outputs), types=dict(program.types))
    fused: dict[int, Instr] = {}
    for instr in program.instrs:
        act = instr.attrs.get("act") if instr.op in PRODUCTS else None
        if act is None:
            plain.instrs.append(instr)
            continue
        assert instr.out is not None
        between = plain.new(program.type(instr.out))
        attrs = {k: v for k, v in instr.attrs.items() if k not in ("act", "act_params")}
        plain.instrs.append(Instr(instr.op, instr.args, attrs, between))
        parameters = dict(instr.attrs.get("act_params") or {})
        plain.instrs.append(Instr(act, (between,), parameters, instr.out))
        fused[between.index] = instr
    return plain, fused


def _fuse_again(
    instrs: list[Instr], fused: Mapping[int, Instr], wanted: Collection[int]
) -> Iterator[Instr]:
    """Undo the split where nobody wants the value between."""
    done = set()
    for instr in instrs:
        if instr.out is not None and instr.out.index in fused and instr.out.index not in wanted:
            yield fused[instr.out.index]
            done.add(fused[instr.out.index].out)
        elif instr.out is None or instr.out not in done:
            yield instr


def _at_hand(program: Program) -> set[int]:
    """Inputs and outputs: the backward program has them for nothing."""
    return {v.index for v in program.outputs.values()} | {
        i.val.index for i in program.inputs.values()
    }


# ------------------------------------------------------------------ the adjoint instructions


@dataclass
class _Part:
    """A part of a value's gradient; with a map, of its elements there."""

    val: Val
    negative: bool = False
    map: tuple[int, ...] | None = None


class Adjoint:
    """Builds the adjoint instructions in a scratch program that knows the forward program's values by their
    numbers, so that rules refer to them as they like. Where each comes from is settled afterwards."""

    def __init__(self, program: Program, active: set[int]) -> None:
        self.program = program
        self.active = active
        self.scratch = Program(
            dtype=program.dtype,
            inputs=dict(program.inputs),
            types=dict(program.types),
            _next=program._next,
        )
        self._first = program._next  # values from here on are the scratch program's own
        self._uniforms = program.uniforms()
        self._names = {i.val.index: n for n, i in program.inputs.items()}
        self._parts: dict[int, list[_Part]] = {}
        self._known: dict[Any, Val] = {}
        self._either: dict[int, tuple[Val, Val]] = {}

    # -- what rules ask for

    def emit(self, op: str, *args: Arg, **attrs: Any) -> Val:
        """Append, or find the same instruction."""
        key = (op, tuple(map(repr, args)), tuple(sorted(attrs.items())))
        if key not in self._known:
            self._known[key] = self.scratch.emit(op, *args, **attrs)
        return self._known[key]

    def add_up(self, op: str, *args: Arg, of: Val, **attrs: Any) -> None:
        target = ("grad", self._names[of.index])
        self.scratch.add_sum(target, self.type(of).shape)
        self.scratch.emit(op, *args, target=target, **attrs)

    def either(self, first: Val, second: Val) -> Val:
        choice = self.scratch.new(self.type(first))
        self._either[choice.index] = (first, second)
        return choice

    def wants(self, arg: Arg) -> bool:
        return isinstance(arg, Val) and arg.index in self.active

    def give(self, arg: Arg, g: Val, *, negative: bool = False) -> None:
        if not isinstance(arg, Val) or not self.wants(arg):
            return
        shape = self.type(arg).shape
        if self.type(arg).width != self.type(g).width:  # a single element, spread over the row
            g = self.emit("sum", self._shaped(g, (self.type(g).width,)))
        if arg.index in self._uniforms:
            self.add_up("row_sum", self.emit("neg", g) if negative else g, of=arg)
        else:
            self._add(arg, _Part(self._shaped(g, shape), negative))

    def give_at(self, arg: Arg, g: Val, map: tuple[int, ...]) -> None:
        if isinstance(arg, Val) and self.wants(arg):
            self._add(arg, _Part(g, map=map))

    def is_uniform(self, arg: Arg) -> bool:
        return isinstance(arg, Val) and arg.index in self._uniforms

    def type(self, val: Val) -> RowType:
        return self.scratch.type(val)

    # -- the parts of a gradient

    def _shaped(self, g: Val, shape: tuple[int, ...]) -> Val:
        return g if self.type(g).shape == shape else self.emit("reshape", g, shape=shape)

    def _add(self, val: Val, part: _Part) -> None:
        self._parts.setdefault(val.index, []).append(part)

    def gradient(self, val: Val) -> Val | None:
        """The sum of the parts; None if there are none."""
        parts = self._parts.get(val.index, [])
        there = [p for p in parts if p.map is not None]
        found = [self._placed(there, self.type(val).shape)] if there else []
        found += [p.val for p in parts if p.map is None and not p.negative]
        minus = [p.val for p in parts if p.map is None and p.negative]
        if not found and not minus:
            return None
        total = found[0] if found else self.emit("neg", minus.pop(0))
        for more in found[1:]:
            total = self.emit("add", total, more)
        for less in minus:
            total = self.emit("sub", total, less)
        return total

    def _placed(self, parts: list[_Part], shape: tuple[int, ...]) -> Val:
        """Parts of elements put in their places, all at once: the slices of a value (gates, mean and scale)
        come back together as one concat."""
        width = RowType(shape).width
        parts = sorted(parts, key=lambda p: p.map or ())
        map = tuple(i for p in parts for i in p.map or ())
        flat = parts[0].val if len(parts) == 1 else self.emit("concat", *(p.val for p in parts))
        if map == tuple(range(width)):
            return self._shaped(flat, shape)
        if len(map) == width and len(set(map)) == width:
            inverse = sorted(range(width), key=map.__getitem__)
            return self.emit("index", flat, map=tuple(inverse), shape=shape)
        times = len(map) // width if width else 0
        if times and map == tuple(i // times for i in range(width * times)):
            rows = self._shaped(flat, (width, times))  # each was spread over a last dim
            return self._shaped(self.emit("sum", rows), shape)
        return self.emit("index_add", flat, map=map, shape=shape)

    # -- the walk

    def run(
        self, wrt: Collection[Any], output_grads: Collection[Any], final_grads: Collection[Any]
    ) -> list[Any]:
        """Emit everything; returns which of the inputs asked for get a gradient."""
        inputs = self.program.inputs
        adjoints: dict[Any, Val] = {}
        for name, item in inputs.items():
            if item.role not in ("carry", "context"):
                continue
            # A carry that nothing reads may still have a last value that matters, and after no steps at
            # all the last value is the first.
            following = next_value(self.program, name) if item.role == "carry" else item.val
            last = name in final_grads and (name in wrt or self.wants(following))
            if last or self.wants(item.val):
                shape = self.type(item.val).shape
                adjoints[name] = self.scratch.input(("adjoint", name), "carry", shape)
        for name, val in adjoints.items():
            # A context, like a carry that the program leaves alone, hands on what it has so far.
            self.give(next_value(self.program, name), val)
        for name, val in self.program.outputs.items():
            if name in output_grads and self.wants(val):
                shape = self.type(val).shape
                self.give(val, self.scratch.input(("grad", name), "step", shape))
        for instr in reversed(self.program.instrs):
            if instr.out is None or instr.out.index not in self.active or instr.op in ZERO:
                continue
            g = self.gradient(instr.out)
            if g is None:
                continue
            if instr.op not in RULES:
                raise ProgramError(f"no gradient of {instr.op}: it is not differentiated again")
            RULES[instr.op](self, instr, g)

        reached = []
        for name, val in adjoints.items():
            g = self.gradient(inputs[name].val)
            # Nothing may have arrived (x ** 0; a carry that nothing reads): the gradient is zero.
            self.scratch.carries["adjoint", name] = (
                self.emit("fill", value=0.0, shape=self.type(val).shape, kind="float")
                if g is None
                else g
            )
            if name in wrt:
                self.scratch.finals.append(("adjoint", name))
                reached.append(name)
        for name in wrt:
            item = inputs[name]
            if item.role == "step":
                g = self.gradient(item.val) if item.val.index in self.active else None
                if g is not None:
                    self.scratch.outputs["grad", name] = g
                    reached.append(name)
            elif item.role == "uniform" and ("grad", name) in self.scratch.sums:
                reached.append(name)
        return reached

    # -- what came of it

    def needs(self, at_hand: Collection[int]) -> set[int]:
        """Drop what nobody uses, settle the choices, and say which forward values are needed."""
        self.scratch = dce(self.scratch)
        uses = {v.index for i in self.scratch.instrs for v in i.values()}
        needs = {i for i in uses if i < self._first}
        chosen: dict[Val, Val] = {}
        for choice, options in self._either.items():
            if choice in uses:
                there = [v for v in options if v.index in needs or v.index in at_hand]
                chosen[Val(choice)] = (there or options)[0]
                needs.add(chosen[Val(choice)].index)
        self.scratch.instrs = [
            with_args(i, lambda v: chosen.get(v, v)) for i in self.scratch.instrs
        ]
        return needs


# ------------------------------------------------------------------ the two programs


class _Tape:
    """Settles where the backward program has each forward value from, and writes both programs."""

    def __init__(
        self,
        plain: Program,
        fused: Mapping[int, Instr],
        needs: set[int],
        carry_outputs: Mapping[Any, Any],
        budget: float | None,
    ) -> None:
        self.plain = plain
        self.fused = fused
        self.needs = needs
        self.saved: dict[Any, Source] = {}
        outputs = {val.index: name for name, val in reversed(plain.outputs.items())}
        taped, self.again = choose(plain, needs, _at_hand(plain), budget)
        self.tape: list[int] = []
        #: number of a forward value -> (name, role) of the backward input that holds it
        self.names: dict[int, tuple[Any, str]] = {}
        uses = needs | {v.index for i in self.again for v in i.values()}
        items = {i.val.index: i for i in plain.inputs.values()}
        for index in sorted(uses):
            if index in items:
                name, role = items[index].name, items[index].role
                if role in ("context", "uniform"):
                    self.names[index] = (name, role)
                    continue
                key = ("saved", name)
                if role == "step":
                    self.saved[key] = Source("input", name)
                elif name in carry_outputs or index in outputs:
                    self.saved[key] = Source("output", carry_outputs.get(name, outputs.get(index)))
                else:
                    key = self._taped(index)
                self.names[index] = (key, "step")
            elif index in outputs:
                key = ("output", outputs[index])
                self.saved[key] = Source("output", outputs[index])
                self.names[index] = (key, "step")
            elif index in taped:
                self.names[index] = (self._taped(index), "step")

    def _taped(self, index: int) -> Any:
        key = ("tape", len(self.tape))
        self.saved[key] = Source("output", key)
        self.tape.append(index)
        return key

    def forward(self) -> Program:
        program = self.plain
        outputs = dict(program.outputs)
        for k, index in enumerate(self.tape):
            outputs["tape", k] = Val(index)
        instrs = list(_fuse_again(program.instrs, self.fused, set(self.tape)))
        return replace(program, instrs=instrs, outputs=outputs)

    def backward(self, adjoint: Adjoint) -> Program:
        scratch = adjoint.scratch
        program = Program(dtype=scratch.dtype)
        new: dict[Val, Val] = {}
        for name, item in scratch.inputs.items():
            if name not in self.plain.inputs:
                type = scratch.type(item.val)
                new[item.val] = program.input(name, item.role, type.shape)
        for index, (name, role) in self.names.items():
            type = scratch.types[index]
            new[Val(index)] = program.input(name, role, type.shape, type.kind)
        for total in scratch.sums.values():
            program.add_sum(total.name, total.shape)
        for instr in (*_fuse_again(self.again, self.fused, self.needs), *scratch.instrs):
            moved = with_args(instr, lambda v: new.get(v, v))
            out = program.emit(moved.op, *moved.args, **moved.attrs)
            if instr.out is not None:
                new[instr.out] = out
        program.carries = {name: new[val] for name, val in scratch.carries.items()}
        program.outputs = {name: new[val] for name, val in scratch.outputs.items()}
        program.finals = list(scratch.finals)
        return program
