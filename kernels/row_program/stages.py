"""Which instructions of a row program run in one pass over a tile, and where values lie between passes.

A pass (*stage*) goes over blocks of columns of all rows of the tile; what it makes stays in registers for
those that follow in it. What a later stage wants is put into the tile's scratch, a row of which is shared out
to the values that are alive at a time. Reshapes and slices are no work: they say where to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastwm.row_program.ops import PRODUCTS, REDUCE
from fastwm.row_program.program import Instr, Program, ProgramError, Val
from fastwm.row_program.room import Room
from fastwm.row_program.sections import one_section

__all__ = ["GATHERS", "GROUPED", "Place", "Plan", "Stage", "Work", "plan"]

GROUPED = {
    *REDUCE, "softmax", "log_softmax", "softmax_grad", "log_softmax_grad", "layer_norm", "layer_norm_grad",
}  # fmt: skip
#: Their operands are read from memory, each element from a place of its own.
GATHERS = {"index", "index_add", "one_hot", "take", "put"}
_ALIGNED = 4  # floats: 16 bytes


@dataclass(frozen=True)
class Place:
    """Where a value lies.

    Attributes:
        space: ``"scratch"``; ``"now"`` or ``"next"``, the halves of the carries' room; ``"input"`` (of a row)
            or ``"uniform"``.
        offset: column of the space.
        name: of an input.
        width: of the whole input.
    """

    space: str
    offset: int = 0
    name: Any = None
    width: int = 0

    def shifted(self, columns: int) -> Place:
        return Place(self.space, self.offset + columns, self.name, self.width)


@dataclass
class Work:
    """One thing that a stage does for each block: an instruction, or a value put somewhere.

    Attributes:
        instr: the instruction; its result is ``out``.
        out: root value made; None where a value is only put somewhere.
        value: what is put somewhere, where there is no instruction.
        to: places that the value is written to.
        outputs: numbers of the program's outputs that it is.
        check: it must hold.
    """

    instr: Instr | None
    out: int | None
    value: Val | None = None
    to: list[Place] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    check: bool = False

    def values(self) -> Iterator[Val]:
        """What it reads."""
        if self.instr is not None:
            yield from self.instr.values()
        elif self.value is not None:
            yield self.value


@dataclass
class Stage:
    """A pass over a tile.

    Attributes:
        kind: ``"product"``, whose first work is one; ``"flat"``, over columns in any blocks; ``"group"``,
            over whole groups.
        groups, width: the columns are ``groups * width``.
        work: in order.
        barrier: what it reads or writes over may still be under way.
    """

    kind: str
    groups: int
    width: int
    work: list[Work]
    barrier: bool = False

    @property
    def columns(self) -> int:
        return self.groups * self.width

    def made(self) -> set[int]:
        return {w.out for w in self.work if w.out is not None}


@dataclass
class Plan:
    """Stages with places.

    Attributes:
        program: what they compute.
        stages: in order.
        places: by root value, where to read it from outside the stage that makes it.
        roots: value -> (root value, first column): through reshapes and slices.
        carries: names of the carries that change, with their column in a half and their width.
        half: columns of a half of the carries' room.
        scratch: columns of the rest.
    """

    program: Program
    stages: list[Stage]
    places: dict[int, Place]
    roots: dict[int, tuple[int, int]]
    carries: list[tuple[Any, int, int]]
    half: int
    scratch: int

    def place(self, val: Val) -> Place:
        root, column = self.roots[val.index]
        return self.places[root].shifted(column)


def plan(program: Program) -> Plan:
    """Stages for a program without sums.

    Raises:
        ProgramError: a program that adds to sums.
    """
    if program.sums:
        raise ProgramError("sums are taken after the sweep")
    return _Planner(program).run()


class _Planner:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.instrs = one_section(program).loop
        self.roots: dict[int, tuple[int, int]] = {}
        self.places: dict[int, Place] = {}
        self.stages: list[Stage] = []
        #: root value -> a fixed place for it: a part of a concatenation, or the next value of a carry
        self.claimed: dict[int, Place] = {}
        self.parts: dict[int, tuple[int, int]] = {}  # part of (concatenation, at column)

    def run(self) -> Plan:
        carries, half = self._inputs()
        for instr in self.instrs:
            if instr.out is not None:
                self.roots[instr.out.index] = self._root(instr)
        self._claim(carries)
        for instr in self.instrs:
            self._add(instr)
        self._ends(carries)
        scratch = self._allocate()
        self._barriers()
        return Plan(self.program, self.stages, self.places, self.roots, carries, half, scratch)

    def _inputs(self) -> tuple[list[tuple[Any, int, int]], int]:
        carries: list[tuple[Any, int, int]] = []
        half = 0
        for name, item in self.program.inputs.items():
            index = item.val.index
            self.roots[index] = index, 0
            width = self.program.type(item.val).width
            if item.role == "uniform":
                self.places[index] = Place("uniform", 0, name, width)
            elif item.role == "carry" and self.program.carries.get(name, item.val) != item.val:
                self.places[index] = Place("now", half)
                carries.append((name, half, width))
                half += _aligned(width)
            else:  # a carry that stays what it is, too
                self.places[index] = Place("input", 0, name, width)
        return carries, half

    def _root(self, instr: Instr) -> tuple[int, int]:
        assert instr.out is not None
        source = next(instr.values(), None)
        if instr.op in ("reshape", "row"):
            assert source is not None
            return self.roots[source.index]
        if instr.op == "index":
            assert source is not None
            indices = instr.attrs["map"]
            first = indices[0] if indices else 0
            if tuple(indices) == tuple(range(first, first + len(indices))):
                root, column = self.roots[source.index]
                return root, column + first
        return instr.out.index, 0

    def _whole(self, val: Val) -> int | None:
        """The root value that this is as a whole, if a stage makes it: no input, no concatenation."""
        root, column = self.roots[val.index]
        made = root in self.makers and self.makers[root].op != "concat"
        same = column == 0 and self.program.type(val).width == self._width(root)
        return root if made and same else None

    def _claim(self, carries: list[tuple[Any, int, int]]) -> None:
        self.makers = {
            i.out.index: i
            for i in self.instrs
            if i.out is not None and self.roots[i.out.index] == (i.out.index, 0)
        }
        for name, column, _ in carries:
            root = self._whole(self.program.carries[name])
            if root is not None and root not in self.claimed:
                self.claimed[root] = Place("next", column)
        for instr in self.instrs:
            if instr.op != "concat":
                continue
            assert instr.out is not None
            column = 0
            for part in instr.values():
                root = self._whole(part)
                if root is not None and root not in self.claimed and root not in self.parts:
                    self.parts[root] = instr.out.index, column
                column += self.program.type(part).width

    def _width(self, index: int) -> int:
        return self.program.types[index].width

    # -- stages

    def _add(self, instr: Instr) -> None:
        out = instr.out
        assert out is not None
        if self.roots[out.index] != (out.index, 0):
            return
        if instr.op == "concat":
            column = 0
            for part in instr.values():
                width = self.program.type(part).width
                if self.parts.get(self.roots[part.index][0]) != (out.index, column):
                    self._put(part, Place("part", column, out.index))
                column += width
            return
        kind, groups, width = self._kind(instr)
        work = Work(instr, out.index)
        if not self._joins(work, kind, groups, width):
            self.stages.append(Stage(kind, groups, width, []))
        self.stages[-1].work.append(work)
        # What is wanted of a value just made, written while it is in registers.
        outputs = enumerate(self.program.outputs.values())
        work.outputs += [number for number, val in outputs if self._whole(val) == out.index]
        work.check = any(self._whole(val) == out.index for val in self.program.checks)

    def _kind(self, instr: Instr) -> tuple[str, int, int]:
        assert instr.out is not None
        shape = self.program.type(instr.out).shape
        if instr.op in PRODUCTS:
            return "product", math.prod(shape[:-1]), shape[-1]
        if instr.op in GROUPED:
            of = next(instr.values())
            shape = self.program.type(of).shape
            return "group", math.prod(shape[:-1]), shape[-1]
        return "flat", 1, math.prod(shape)

    def _joins(self, work: Work, kind: str, groups: int, width: int) -> bool:
        """Whether the last stage can do this as well; it may become one over groups for it."""
        if not self.stages or kind == "product":
            return False
        stage = self.stages[-1]
        columns = groups * width
        if kind == "group":
            alike = (stage.groups, stage.width) == (groups, width)
            if stage.kind == "flat" and stage.columns == columns and self._ready(work, stage):
                stage.kind, stage.groups, stage.width = "group", groups, width
                return True
            return stage.kind == "group" and alike and self._ready(work, stage)
        narrow = stage.kind == "group" and columns == stage.groups
        return (columns == stage.columns or narrow) and self._ready(work, stage)

    def _ready(self, work: Work, stage: Stage) -> bool:
        """Whether every operand is in registers as it is wanted, or was in memory before the stage."""
        made = stage.made()
        # Concatenations that it puts parts of: whole only once it is through.
        joined = {self.parts[m][0] for m in made if m in self.parts}
        joined |= {p.name for w in stage.work for p in w.to if p.space == "part"}
        gathers = work.instr is not None and work.instr.op in GATHERS
        for val in work.values():
            root, column = self.roots[val.index]
            inside = root in made or root in joined
            if not inside:
                continue
            if (
                gathers
                or column
                or root not in made
                or self.program.type(val).width != self._width(root)
            ):
                return False
        return True

    def _put(self, val: Val, place: Place | None, **kind: Any) -> None:
        """A value written somewhere else, in a stage of its own or the last one."""
        work = Work(None, None, val, [] if place is None else [place], **kind)
        width = self.program.type(val).width
        stage = self.stages[-1] if self.stages else None
        if stage is None or stage.columns != width or not self._ready(work, stage):
            stage = Stage("flat", 1, width, [])
            self.stages.append(stage)
        stage.work.append(work)

    def _ends(self, carries: list[tuple[Any, int, int]]) -> None:
        """Outputs, checks and next values that are no whole value which a stage makes."""
        for number, val in enumerate(self.program.outputs.values()):
            if self._whole(val) is None:
                self._put(val, None, outputs=[number])
        for val in self.program.checks:
            if self._whole(val) is None:
                self._put(val, None, check=True)
        for name, at, _ in carries:
            val = self.program.carries[name]
            if self.claimed.get(self.roots[val.index][0]) != Place("next", at):
                self._put(val, Place("next", at))

    # -- memory

    def _reads(self, stage: Stage) -> Iterator[int]:
        """Root values that a stage reads from memory."""
        made: set[int] = set()
        for work in stage.work:
            for val in work.values():
                root = self.roots[val.index][0]
                if root not in made:
                    yield root
            if work.out is not None:
                made.add(work.out)

    def _allocate(self) -> int:
        """A place in scratch for whatever a stage makes and another reads."""
        last: dict[int, int] = {}
        for number, stage in enumerate(self.stages):
            for root in self._reads(stage):
                last[root] = number
        first: dict[int, int] = {}
        for number, stage in enumerate(self.stages):
            for work in stage.work:
                if work.out is None:
                    for place in work.to:
                        if place.space == "part":
                            first.setdefault(place.name, number)
                elif work.out in self.parts:
                    whole = self.parts[work.out][0]
                    first.setdefault(whole, number)
                    last[whole] = max(last.get(whole, number), last.get(work.out, number))
                elif work.out in last and work.out not in self.claimed:
                    first[work.out] = number
        room = Room()
        free_at: dict[int, list[int]] = {}
        for root in first:
            free_at.setdefault(last.get(root, first[root]), []).append(root)
        for number in range(len(self.stages)):
            for root in (r for r, at in first.items() if at == number):
                self.places[root] = Place("scratch", room.take(_aligned(self._width(root))))
            for root in free_at.get(number, ()):
                room.give(self.places[root].offset, _aligned(self._width(root)))
        self.places.update(self.claimed)
        for part, (whole, column) in self.parts.items():
            self.places[part] = self.places[whole].shifted(column)
        for stage in self.stages:
            for work in stage.work:
                if work.out is not None and (
                    work.out in last or work.out in self.claimed or work.out in self.parts
                ):
                    work.to.append(self.places[work.out])
                work.to = [
                    self.places[p.name].shifted(p.offset) if p.space == "part" else p
                    for p in work.to
                ]
        return room.size

    def _barriers(self) -> None:
        """One before each stage that touches what has been touched since the last."""
        read: list[tuple[str, int, int]] = []
        written: list[tuple[str, int, int]] = []
        for stage in self.stages:
            reads = [_span(self.places[r], self._width(r)) for r in self._reads(stage)]
            reads = [s for s in reads if s[0] in ("scratch", "now", "next")]
            writes = []
            for work in stage.work:
                width = stage.columns if work.out is None else self._width(work.out)
                writes += [_span(p, width) for p in work.to]
            stage.barrier = _meet(reads, written) or _meet(writes, written) or _meet(writes, read)
            if stage.barrier:
                read, written = [], []
            read += reads
            written += writes


def _span(place: Place, width: int) -> tuple[str, int, int]:
    return place.space, place.offset, place.offset + width


def _meet(some: list[tuple[str, int, int]], others: list[tuple[str, int, int]]) -> bool:
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in some for b in others)


def _aligned(width: int) -> int:
    return -(-width // _ALIGNED) * _ALIGNED
