"""A program's instructions in three sections: what may run ahead of the loop over steps, the loop, the rest.

Only the loop must run step by step. What depends on no carry can run before it, for all steps at once, and
what no carry depends on can run after it: larger matrices, fewer passes over the weights. The price is that
values which cross from one section to another are stored for every step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fastwm.row_program.ops import MOVEMENT
from fastwm.row_program.passes.rewrite import definitions
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["Sections", "one_section", "sections"]

_AHEAD, _LOOP, _AFTER = range(3)


@dataclass
class Sections:
    """Instructions by section, each in the program's order.

    Attributes:
        ahead: those that depend on no carry.
        loop: those that a carry's next value depends on.
        after: the others; all that adds to a sum, unless it is ahead.
        crossing: values to be stored for each step because a later section uses them. Step inputs and
            outputs are not among them: they are there for each step anyway.
    """

    ahead: list[Instr] = field(default_factory=list)
    loop: list[Instr] = field(default_factory=list)
    after: list[Instr] = field(default_factory=list)
    crossing: list[Val] = field(default_factory=list)


def sections(program: Program) -> Sections:
    """Split a program's instructions.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.sections import sections
        >>> p = Program()
        >>> x, noise = p.input("x", "carry", (3,)), p.input("noise", "step", (3,))
        >>> p.carries["x"] = p.emit("add", p.emit("tanh", x), p.emit("exp", noise))
        >>> p.outputs["reward"] = p.emit("sum", p.carries["x"])
        >>> found = sections(p)
        >>> [[i.op for i in s] for s in (found.ahead, found.loop, found.after)]
        [['exp'], ['tanh', 'add'], ['sum']]
        >>> found.crossing
        [%3, %4]
    """
    split = _Split(program)
    while split.sink() or split.narrow():
        pass
    found = Sections(crossing=split.crossing())
    for instr, section in zip(program.instrs, split.section, strict=True):
        (found.ahead, found.loop, found.after)[section].append(instr)
    return found


def one_section(program: Program) -> Sections:
    """Everything in the loop, each instruction put off until somebody needs it, so that few values are alive
    at a time.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.sections import one_section
        >>> p = Program()
        >>> x, noise = p.input("x", "carry", (3,)), p.input("noise", "step", (3,))
        >>> scale = p.emit("exp", noise)
        >>> p.carries["x"] = p.emit("tanh", x)
        >>> p.outputs["minus"] = p.emit("neg", scale)
        >>> [i.op for i in one_section(p).loop]
        ['tanh', 'exp', 'neg']
    """
    maker = definitions(program)
    found: list[Instr] = []
    done: set[int] = set()

    def need(instr: Instr) -> None:
        stack = [(instr, instr.values())]
        while stack:
            current, rest = stack[-1]
            for val in rest:
                made = maker.get(val.index)
                if made is not None and id(made) not in done:
                    stack.append((made, made.values()))
                    break
            else:
                stack.pop()
                if id(current) not in done:
                    done.add(id(current))
                    found.append(current)

    for instr in program.instrs:
        if instr.out is None:
            need(instr)
    wanted = {v.index for v in program.roots()}
    for instr in program.instrs:
        if instr.out is not None and instr.out.index in wanted:
            need(instr)
    return Sections(loop=found)


class _Split:
    """The section of each instruction, by position."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.carries = {i.val.index for i in program.inputs.values() if i.role == "carry"}
        inputs = {i.val.index for i in program.inputs.values()}
        #: stored for each step, or the same at every step: these cross for nothing
        self.free = (inputs - self.carries) | {v.index for v in program.outputs.values()}
        self.maker = {i.out.index: n for n, i in enumerate(program.instrs) if i.out is not None}
        self.users: dict[int, list[int]] = {}
        for position, instr in enumerate(program.instrs):
            for index in {v.index for v in instr.values()}:
                self.users.setdefault(index, []).append(position)
        self.section = self._first()

    def _first(self) -> list[int]:
        carried = set(self.carries)
        for instr in self.program.instrs:
            if instr.out is not None and any(v.index in carried for v in instr.values()):
                carried.add(instr.out.index)
        following = {v.index for v in self.program.carries.values()}
        for instr in reversed(self.program.instrs):
            if instr.out is not None and instr.out.index in following:
                following |= {v.index for v in instr.values()}
        section = []
        for instr in self.program.instrs:
            if not any(v.index in carried for v in instr.values()):
                section.append(_AHEAD)
            else:
                loop = instr.out is not None and instr.out.index in following
                section.append(_LOOP if loop else _AFTER)
        return section

    def _home(self, index: int) -> int:
        """The section that makes a value; inputs but carries are there from the start."""
        if index in self.maker:
            return self.section[self.maker[index]]
        return _LOOP if index in self.carries else _AHEAD

    def _crosses(self, index: int) -> bool:
        if index in self.free:
            return False
        home = self._home(index)
        last = max((self.section[n] for n in self.users.get(index, ())), default=home)
        # A value made ahead that becomes a carry is read in the loop.
        if home == _AHEAD and any(v.index == index for v in self.program.carries.values()):
            last = max(last, _LOOP)
        return last > home

    def crossing(self) -> list[Val]:
        values = [*self.carries, *self.maker]
        return [Val(i) for i in sorted(values) if self._crosses(i)]

    def _width(self, indices: Iterable[int]) -> int:
        return sum(self.program.types[i].width for i in set(indices) if self._crosses(i))

    def sink(self) -> bool:
        """Move what only moves numbers to the one later section that uses its result, where fewer cross."""
        moved = False
        for position in reversed(range(len(self.program.instrs))):
            instr = self.program.instrs[position]
            if instr.op not in MOVEMENT or instr.out is None or not self._crosses(instr.out.index):
                continue
            homes = {self.section[n] for n in self.users.get(instr.out.index, ())}
            if any(v == instr.out for v in self.program.carries.values()):
                homes.add(_LOOP)
            here = self.section[position]
            if len(homes) != 1 or here == _LOOP:
                continue  # out of the loop is for ``narrow``; a carry may depend on it
            touched = [instr.out.index, *(v.index for v in instr.values())]
            before = self._width(touched)
            self.section[position] = homes.pop()
            after = self._width(touched)
            # A reshape costs nothing anywhere, and the movement before it may follow it.
            if after < before or (after == before and instr.op == "reshape"):
                moved = True
            else:
                self.section[position] = here
        return moved

    def narrow(self) -> bool:
        """Move into the loop what takes narrow parts of a wide value for the section after it."""
        moved = False
        for index in sorted({*self.carries, *self.maker}):
            if self._home(index) != _LOOP or not self._crosses(index):
                continue
            late = [n for n in self.users.get(index, ()) if self.section[n] == _AFTER]
            if any(not self._movable(n) for n in late):
                continue
            touched = [index]
            for n in late:
                instr = self.program.instrs[n]
                touched += [v.index for v in (*instr.values(), instr.out) if v is not None]
            before = self._width(touched)
            for n in late:
                self.section[n] = _LOOP
            if self._width(touched) < before:
                moved = True
            else:
                for n in late:
                    self.section[n] = _AFTER
        return moved

    def _movable(self, position: int) -> bool:
        instr = self.program.instrs[position]
        return instr.op in MOVEMENT and all(self._home(v.index) < _AFTER for v in instr.values())
