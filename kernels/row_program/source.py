"""The Triton source of a row program: one kernel that runs the whole horizon.

A program instance takes tile after tile of rows, and each of them from the first step to the last. Nothing is
synchronised between tiles; within one, a barrier stands wherever a stage reads what another wrote.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastwm.kernels.row_program.stages import GATHERS, Place, Plan, Stage, Work
from fastwm.row_program.kinds import dtype_name
from fastwm.row_program.noise import Noise
from fastwm.row_program.ops import BINARY, PRODUCTS, REDUCE, UNARY, UNARY_GRAD
from fastwm.row_program.program import Instr, Program, Val

__all__ = ["Source", "Tile", "matrices", "scratch_columns", "write"]


@dataclass(frozen=True)
class Tile:
    """Sizes of what a program instance works on; powers of two.

    Attributes:
        rows: of a tile; products on tensor cores need 16.
        columns: of a block of a product's result, and about that many of any other block.
        depth: of a product's block along K.
        warps, stages: as Triton has them.
    """

    rows: int = 16
    columns: int = 64
    depth: int = 32
    warps: int = 4
    stages: int = 1


@dataclass
class Source:
    """A kernel's text and what its launcher must know.

    Attributes:
        text: of the module; the kernel is ``row_program_kernel``.
        arguments: of the kernel, in order: pointers, then numbers.
        maps: what ``p_maps`` holds.
        columns: of a row of scratch.
    """

    text: str
    arguments: list[str]
    maps: list[int]
    columns: int


#: Column 0 of a value of one element, as a block: Triton spreads blocks alike, numbers not everywhere.
_FIRST = "tl.zeros((1, 1), tl.int32)"
#: Variables of a stage. Each stage has its own: one that was there before a loop and is set in it would be
#: carried from turn to turn, and must keep its type.
_OWN = re.compile(
    r"(?<![.'\w])(o_zero|[om]_[ircngk]|o_from\d*|i_[cngkmar]|m_r|acc|chosen|mine|total|[abvw])\b(?!=)"
)
_HEAD = '''"""A row program."""

import triton
import triton.language as tl

from fastwm.kernels.row_program import functions as f
from fastwm.kernels.row_program import noise


@triton.jit(do_not_specialize=["first", "last", "rows", "steps", "tiles"])
def row_program_kernel({arguments}):
'''

_BINARY = {
    "add": "{a} + {b}", "sub": "{a} - {b}", "mul": "{a} * {b}", "div": "{a} / {b}",
    "pow": "f.pow_({a}, {b})", "maximum": "f.maximum({a}, {b})", "minimum": "f.minimum({a}, {b})",
    "clamp_min": "f.maximum({a}, {b})", "clamp_max": "f.minimum({a}, {b})",
    "gt": "({a} > {b}).to({dt})", "ge": "({a} >= {b}).to({dt})", "lt": "({a} < {b}).to({dt})",
    "le": "({a} <= {b}).to({dt})", "eq": "({a} == {b}).to({dt})", "ne": "({a} != {b}).to({dt})",
    "and": "(({a} != 0.0) & ({b} != 0.0)).to({dt})", "or": "(({a} != 0.0) | ({b} != 0.0)).to({dt})",
    "xor": "(({a} != 0.0) ^ ({b} != 0.0)).to({dt})",
}  # fmt: skip
_UNARY = {
    "neg": "-{x}", "exp": "tl.exp({x})", "log": "tl.log({x})", "sqrt": "tl.sqrt({x})",
    "rsqrt": "1.0 / tl.sqrt({x})", "reciprocal": "1.0 / {x}", "square": "{x} * {x}", "abs": "tl.abs({x})",
    "floor": "tl.floor({x})", "ceil": "tl.ceil({x})", "round": "f.round_({x})", "sin": "tl.sin({x})",
    "cos": "tl.cos({x})", "erf": "tl.erf({x})", "detach": "{x}", "not": "({x} == 0.0).to({dt})",
    "isnan": "f.isnan({x}).to({dt})", "isfinite": "(tl.abs({x}) < float('inf')).to({dt})",
}  # fmt: skip


def write(
    program_plan: Plan, tile: Tile, *, reverse: bool, time_major: Collection[Any],
    kinds: Mapping[Any, str], precision: str, order: Sequence[Any], local: Collection[Any] = (),
    noise: Mapping[Any, Noise] | None = None,
) -> Source:  # fmt: skip
    """The source for tiles of this size.

    Args:
        time_major: step inputs given as ``[steps, rows, width]``.
        kinds: by output name, what its tensor holds.
        precision: of products: ``"ieee"``, ``"tf32"``, ``"tf32x3"``, or ``"bf16"`` for those with matrices in
            bfloat16, which are arguments of their own, in the order of :func:`matrices`.
        order: of the inputs.
        local: outputs that hold the rows from ``first`` on alone.
        noise: inputs that are drawn where they are read; their argument is the key.
    """
    return _Writer(
        program_plan, tile, reverse, set(time_major), dict(kinds), precision,
        {name: i for i, name in enumerate(order)}, set(local), dict(noise or {}),
    ).run()  # fmt: skip


def matrices(program: Program) -> list[Any]:
    """Names of the uniforms that products multiply with."""
    found = {
        i.args[1].index for i in program.instrs if i.op in PRODUCTS and isinstance(i.args[1], Val)
    }
    return [name for name, item in program.inputs.items() if item.val.index in found]


def scratch_columns(program_plan: Plan) -> int:
    """Columns of a row of scratch: both halves of the carries' room, and the rest."""
    return -(-(2 * program_plan.half + program_plan.scratch) // 32) * 32 or 32


@dataclass
class _Block:
    """How a stage's block of columns is addressed: rank, and the text of its columns and mask."""

    rank: int
    columns: str
    mask: str
    shape: str
    axis: int = 1
    made: dict[int, str] = field(default_factory=dict)  # root value -> its name in registers
    loaded: dict[str, str] = field(default_factory=dict)  # text of a load -> its name

    @property
    def row(self) -> str:
        """Rows of the tile, as wide as the block has dims."""
        return "o_i[:, None]" if self.rank == 2 else "o_i[:, None, None]"

    @property
    def along(self) -> str:
        """What makes a vector over the last dim of the block."""
        return "[None, :]" if self.rank == 2 else "[None, None, :]"

    @property
    def rows(self) -> str:
        """Which of them there are."""
        return "m_r" if self.rank == 2 else "m_r[:, :, None]"


class _Writer:
    def __init__(
        self, program_plan: Plan, tile: Tile, reverse: bool, time_major: set[Any], kinds: dict[Any, str],
        precision: str, number: dict[Any, int], local: set[Any], noise: dict[Any, Noise],
    ) -> None:  # fmt: skip
        self.plan = program_plan
        self.program = program_plan.program
        self.tile = tile
        self.reverse = reverse
        self.time_major = time_major
        self.kinds = kinds
        self.precision = precision
        self.number = number  # of each input
        self.local = local
        self.noise = noise
        self.rounded = matrices(self.program) if precision == "bf16" else []
        self.dt = f"tl.{dtype_name(self.program.dtype)}"
        self.lines: list[str] = []
        self.depth = 1
        self.loads = 0
        self.maps: list[int] = []
        self.map_at: dict[tuple[int, ...], int] = {}
        self.half = program_plan.half
        self.columns = scratch_columns(program_plan)

    # -- text

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def _own(self, suffix: str) -> Iterator[None]:
        """What is written meanwhile has variables of its own."""
        start, depth = len(self.lines), self.depth
        yield
        self.lines[start:] = [_OWN.sub(rf"\1_{suffix}", line) for line in self.lines[start:]]
        self.depth = depth

    def run(self) -> Source:
        program = self.program
        arguments = [f"p_in{i}" for i in range(len(self.number))]
        arguments += [f"p_bf16_{i}" for i in range(len(self.rounded))]
        arguments += [f"p_out{i}" for i in range(len(program.outputs))]
        arguments += [f"p_final{i}" for i in range(len(program.finals))]
        arguments += ["p_failed", "p_maps", "p_scratch", "first", "last", "rows", "steps", "tiles"]
        self._body(list(program.finals))
        head = _HEAD.format(arguments=", ".join(arguments))
        text = head + "\n".join(self.lines) + "\n"
        return Source(text, arguments, self.maps or [0], self.columns)

    def _body(self, finals: list[Any]) -> None:
        BM = self.tile.rows
        self.line("pid = tl.program_id(0).to(tl.int64)")
        self.line(f"p_tile = p_scratch + pid * {BM * self.columns}")
        self.line("for i_tile in range(tiles):")
        self.depth += 1
        self.line(f"i_row = first + (pid + i_tile * tl.num_programs(0)) * {BM}")
        for number, (name, at, width) in enumerate(self.plan.carries):
            with self._own(f"c{number}"):
                self._rows()
                self._start(name, at, width)
        self.line("for i_step in range(steps):")
        self.depth += 1
        self.line("i_t = steps - 1 - i_step" if self.reverse else "i_t = i_step")
        self.line(f"o_now = (i_step % 2) * {self.half}")
        self.line(f"o_next = {self.half} - o_now")
        self.line("tl.debug_barrier()")
        for number, stage in enumerate(self.plan.stages):
            if stage.barrier:
                self.line("tl.debug_barrier()")
            with self._own(str(number)):
                self._stage(stage)
        self.depth -= 1
        self.line("tl.debug_barrier()")
        if finals:
            self.line(f"o_now = (steps % 2) * {self.half}")
        for number, name in enumerate(finals):
            with self._own(f"f{number}"):
                self._rows()
                self._final(number, name)
        if finals or self.plan.carries:
            self.line("tl.debug_barrier()")

    def _rows(self, rows: int = 0, first: str = "o_zero") -> None:
        """The rows of the tile; anew for each stage, in numbers that a compiler cannot know to be the same.

        Else it works out the addresses of all stages ahead of the loop over steps, and has no registers left.
        """
        if not rows:
            self.line("o_zero = f.zero()")
        self.line(f"o_i = {first} + tl.arange(0, {rows or self.tile.rows})")
        self.line("m_r = (o_i < last - i_row)[:, None]")

    def _start(self, name: Any, at: int, width: int) -> None:
        """A carry's first value into its room."""
        block = self._over_columns(width)
        v = self._load(Place("input", 0, name, width), block, width)
        address = f"p_tile + (o_i[:, None] * {self.columns} + {at} + o_c)"
        self.line(f"tl.store({address}, tl.broadcast_to({v}, {block.shape}), mask={block.mask})")
        self.depth -= 1

    def _final(self, number: int, name: Any) -> None:
        width = self.program.type(self.program.inputs[name].val).width
        at = next((at for n, at, _ in self.plan.carries if n == name), None)
        block = self._over_columns(width)
        source = Place("input", 0, name, width) if at is None else Place("now", at)
        v = self._load(source, block, width)
        address = f"p_final{number} + i_row * {width} + (o_i[:, None] * {width} + o_c)"
        mask = _both("m_r", block.mask)
        self.line(f"tl.store({address}, tl.broadcast_to({v}, {block.shape}), mask={mask})")
        self.depth -= 1

    def _over_columns(self, width: int) -> _Block:
        """Opens a loop over columns."""
        size = min(_power(width), self.tile.columns)
        self.line(f"for i_c in range(o_zero, {width}, {size}):")
        self.depth += 1
        self.line(f"o_c = (i_c + tl.arange(0, {size}))[None, :]")
        return _Block(2, "o_c", f"(o_c < {width})", f"({self.tile.rows}, {size})")

    # -- stages

    def _stage(self, stage: Stage) -> None:
        what = ", ".join(w.instr.op if w.instr is not None else "put" for w in stage.work)
        self.line(f"# {stage.kind} {stage.groups} x {stage.width}: {what}")
        if stage.kind != "group":
            self._rows()
        if stage.kind == "product":
            block = self._product(stage)
        elif stage.kind == "group":
            block = self._groups(stage)
        else:
            block = self._over_columns(stage.width)
        for work in stage.work[1:] if stage.kind == "product" else stage.work:
            self._work(work, stage, block)

    def _groups(self, stage: Stage) -> _Block:
        """Opens loops over rows and whole groups: of so many that a block is no larger than elsewhere."""
        size = _power(stage.width)
        many = max(1, min(_power(stage.groups), self.tile.columns // size))
        room = max(self.tile.rows * self.tile.columns, 512 * self.tile.warps)
        rows = max(1, min(self.tile.rows, room // (many * size)))
        self.line("o_zero = f.zero()")
        self.line(f"for i_r in range(o_zero, {self.tile.rows}, {rows}):")
        self.depth += 1
        self._rows(rows, "i_r")
        self.line(f"o_n = o_zero + tl.arange(0, {size})")
        if stage.groups == 1:
            self.line("o_c = o_n[None, :]")
            return _Block(2, "o_c", f"(o_c < {stage.width})", f"({rows}, {size})")
        self.line(f"for i_g in range(o_zero, {stage.groups}, {many}):")
        self.depth += 1
        self.line(f"o_g = (i_g + tl.arange(0, {many}))[None, :, None]")
        self.line(f"m_g = o_g < {stage.groups}")
        self.line(f"o_c = o_g * {stage.width} + o_n[None, None, :]")
        self.line(f"m_c = m_g & (o_n < {stage.width})[None, None, :]")
        return _Block(3, "o_c", "m_c", f"({rows}, {many}, {size})", 2)

    def _product(self, stage: Stage) -> _Block:
        """Opens loops over groups and columns, and computes the product in the innermost."""
        work = stage.work[0]
        instr = work.instr
        assert instr is not None
        x, w, b = instr.args[:3]
        assert isinstance(x, Val)
        assert isinstance(w, Val)
        BM, types = self.tile.rows, self.program.types
        k, n = types[x.index].shape[-1], stage.width
        BN = max(16, min(_power(n), self.tile.columns))
        BK = max(16, min(_power(k), self.tile.depth))
        own = instr.op == "grouped_linear"
        each = len(types[x.index].shape) > 1 or not own  # every group has its own part of the row
        if stage.groups > 1:
            self.line(f"for i_g in range({stage.groups}):")
            self.depth += 1
        group = "i_g" if stage.groups > 1 else "0"
        self.line(f"for i_n in range(o_zero, {n}, {BN}):")
        self.depth += 1
        self.line(f"o_n = i_n + tl.arange(0, {BN})")
        self.line(f"m_n = (o_n < {n})[None, :]")
        self.line(f"acc = tl.zeros(({BM}, {BN}), {self.dt})")
        member = instr.op == "member_linear"
        members = types[w.index].shape[0]
        block = _Block(2, "o_c", "m_n", f"({BM}, {BN})")
        weight = self._matrix(self.plan.place(w).name)
        if member:
            index = instr.args[3]
            assert isinstance(index, Val)
            self.line(f"chosen = {self._load(self.plan.place(index), block, 1)}")
            self.line(f"for i_m in range({members}):")
            self.depth += 1
            self.line("mine = chosen == i_m")
            self.line("if tl.max((mine & m_r).to(tl.int32)) > 0:")
            self.depth += 1
        self.line(f"for i_k in range(o_zero, {k}, {BK}):")
        self.depth += 1
        self.line(f"o_k = i_k + tl.arange(0, {BK})")
        self.line(f"m_k = o_k < {k}")
        part = f"{group} * {k} + " if each and stage.groups > 1 else ""
        inner = _Block(2, f"({part}o_k[None, :])", "m_k[None, :]", f"({BM}, {BK})")
        a = self._load_at(self.plan.place(x), inner, inner.columns, inner.mask)
        self.line(f"a = tl.broadcast_to({a}, {inner.shape})")
        if member:
            self.line("a = tl.where(mine, a, 0.0)")
        which = f"{group} * {k * n} + " if own else f"i_m * {k * n} + " if member else ""
        at = (
            f"o_n[None, :] * {k} + o_k[:, None]"
            if instr.attrs["layout"] == "nk"
            else f"o_k[:, None] * {n} + o_n[None, :]"
        )
        self.line(f"w = tl.load({weight} + ({which}{at}), mask=m_k[:, None] & m_n, other=0.0)")
        self.line(f"acc = {self._added_product()}")
        self.depth -= 3 if member else 1
        if isinstance(b, Val):
            p_b = f"p_in{self.number[self.plan.place(b).name]}"
            if member:
                at = f"f.index(chosen, {members}) * {n} + o_n[None, :]"
                self.line(f"acc += tl.load({p_b} + ({at}), mask=m_n, other=0.0)")
            else:
                first = f"{group} * {n} + " if own else ""
                self.line(
                    f"acc += tl.load({p_b} + ({first}o_n), mask=o_n < {n}, other=0.0)[None, :]"
                )
        act = instr.attrs.get("act")
        if act is not None:
            self.line(f"acc = {self._unary(act, 'acc', instr.attrs.get('act_params') or {})}")
        self.line(f"o_c = ({group} * {n} + o_n)[None, :]")
        assert work.out is not None
        name = f"v{work.out}"
        self.line(f"{name} = acc")
        block.made[work.out] = name
        self._writes(work, name, block)
        return block

    def _matrix(self, name: Any) -> str:
        """Where a matrix begins."""
        if self.rounded:
            return f"p_bf16_{self.rounded.index(name)}"
        return f"p_in{self.number[name]}"

    def _added_product(self) -> str:
        if self.rounded:
            return "f.add_bf16_product(a, w, acc)"
        return f"tl.dot(a, w, acc, input_precision={self.precision!r}, out_dtype={self.dt})"

    # -- works

    def _work(self, work: Work, stage: Stage, block: _Block) -> None:
        if work.instr is None:
            assert work.value is not None
            self._writes(work, self._operand(work.value, block, stage), block)
            return
        assert work.out is not None
        own = self._of_width(self.program.types[work.out].width, stage, block)
        # A reduction goes over the whole block, and leaves one element per group.
        over = block if work.instr.op in REDUCE else own
        text = self._expression(work.instr, stage, over)
        name = f"v{work.out}"
        self.line(f"{name} = {text}")
        block.made[work.out] = name
        self._writes(work, name, own)

    def _of_width(self, width: int, stage: Stage, block: _Block) -> _Block:
        """The block of a value: of a stage over groups, perhaps one element for each of them."""
        if stage.kind != "group" or not width == stage.groups != stage.columns:
            return block
        if block.rank == 2:
            return _Block(
                2, _FIRST, "", f"{block.shape.partition(',')[0]}, 1)", 1, block.made, block.loaded
            )
        shape = f"{block.shape.rpartition(',')[0]}, 1)"
        return _Block(3, "o_g", "m_g", shape, 2, block.made, block.loaded)

    def _writes(self, work: Work, name: str, block: _Block) -> None:
        if not (work.to or work.outputs or work.check):
            return
        self.line(f"b = tl.broadcast_to({name}, {block.shape})")
        for place in work.to:
            self.line(
                f"tl.store({self._scratch(place, block, block.columns)}, b{_masked(block.mask)})"
            )
        for number in work.outputs:
            row = self._output(number, block)
            kind = self._output_kind(number)
            value = {"bool": "b != 0.0", "int": "f.whole(b)"}.get(kind, "b")
            mask = _both(block.rows, block.mask)
            self.line(f"tl.store({row} + {block.columns}, {value}, mask={mask})")
        if work.check:
            mask = _both(block.rows, block.mask)
            self.line(f"f.fail(p_failed, i_t, {mask} & (b == 0.0))")

    def _output_kind(self, number: int) -> str:
        name = list(self.program.outputs)[number]
        return self.kinds.get(name, self.program.type(self.program.outputs[name]).kind)

    # -- operands

    def _load(self, place: Place, block: _Block, width: int) -> str:
        """A value as the block has it; a single element as it is, to be spread."""
        if width == 1:
            return self._load_at(place, block, _FIRST, "")
        return self._load_at(place, block, block.columns, block.mask)

    def _load_at(self, place: Place, block: _Block, columns: str, mask: str) -> str:
        """Elements of a value, in a variable."""
        if place.space == "input" and place.name in self.noise:
            text = self._drawn(place, block, columns, _both(block.rows, mask))
            return self._variable(text, block)
        if place.space == "uniform":
            address = f"p_in{self.number[place.name]} + ({place.offset} + {columns})"
        elif place.space == "input":
            address = f"{self._input(place.name, block)} + ({place.offset} + {columns})"
            mask = _both(block.rows, mask)
        else:
            address = self._scratch(place, block, columns)
        text = f"tl.load({address}, mask={mask}, other=0)" if mask else f"tl.load({address})"
        return self._variable(text + self._converted(place), block)

    def _variable(self, text: str, block: _Block) -> str:
        if text not in block.loaded:
            block.loaded[text] = name = f"x{self.loads}"
            self.loads += 1
            self.line(f"{name} = {text}")
        return block.loaded[text]

    def _drawn(self, place: Place, block: _Block, columns: str, mask: str) -> str:
        """Elements of noise, and 0 where a load would give that."""
        drawn = self.noise[place.name]
        arguments = [
            f"p_in{self.number[place.name]}", f"{place.offset} + {columns}", f"i_row + {block.row}", "i_t",
            str(drawn.number), *map(self._constant, drawn.law.numbers(self.program.dtype)), self.dt,
        ]  # fmt: skip
        return f"tl.where({mask}, noise.{drawn.law.name}({', '.join(arguments)}), 0.0)"

    def _input(self, name: Any, block: _Block) -> str:
        """Where a tile's rows of an input begin, and each row's distance from there, in 32 bits."""
        item, k = self.program.inputs[name], self.number[name]
        width = self.program.type(item.val).width
        if item.role != "step":
            return f"p_in{k} + i_row * {width} + {block.row} * {width}"
        if name in self.time_major:
            return f"p_in{k} + (tl.cast(i_t, tl.int64) * rows + i_row) * {width} + {block.row} * {width}"
        return f"p_in{k} + (i_row * steps + i_t) * {width} + {block.row} * (steps * {width})"

    def _output(self, number: int, block: _Block) -> str:
        name, val = list(self.program.outputs.items())[number]
        width = self.program.type(val).width
        row = "(i_row - first)" if name in self.local else "i_row"
        return f"p_out{number} + ({row} * steps + i_t) * {width} + {block.row} * (steps * {width})"

    def _scratch(self, place: Place, block: _Block, columns: str) -> str:
        base = {"now": f"o_now + {place.offset}", "next": f"o_next + {place.offset}"}.get(
            place.space, str(2 * self.half + place.offset)
        )
        return f"p_tile + ({block.row} * {self.columns} + ({base} + {columns}))"

    def _converted(self, place: Place) -> str:
        if place.space not in ("input", "uniform"):
            return ""
        kind = self.program.type(self.program.inputs[place.name].val).kind
        return "" if kind == "float" else f".to({self.dt})"

    def _operand(self, arg: Any, block: _Block, stage: Stage) -> str:
        if not isinstance(arg, Val):
            return self._constant(float(arg))
        root, _ = self.plan.roots[arg.index]
        if root in block.made:
            return block.made[root]
        width = self.program.type(arg).width
        return self._load(self.plan.place(arg), self._of_width(width, stage, block), width)

    def _constant(self, value: float, shape: str = "(1, 1)") -> str:
        text = repr(value) if math.isfinite(value) else f"float('{value}')"
        return f"tl.full({shape}, {text}, {self.dt})"

    # -- ops

    def _unary(self, op: str, x: str, params: Mapping[str, float]) -> str:
        if op in _UNARY:
            return _UNARY[op].format(x=x, dt=self.dt)
        names = UNARY[op][1]
        arguments = [x, *(self._constant(float(params[name])) for name in names)]
        return f"f.{op}({', '.join(arguments)})"

    def _expression(self, instr: Instr, stage: Stage, block: _Block) -> str:
        op, attrs = instr.op, instr.attrs
        if op in GATHERS:
            return getattr(self, f"_{op}")(instr, block)
        arguments = [self._operand(a, block, stage) if a is not None else "" for a in instr.args]
        if op in UNARY:
            return self._unary(op, arguments[0], attrs)
        if op in UNARY_GRAD:
            more = [self._constant(float(attrs[name])) for name in UNARY_GRAD[op][1]]
            return f"f.{op}({', '.join([*arguments, *more])})"
        if op == "pow" and isinstance(instr.args[1], float) and instr.args[1] in _POWERS:
            return _POWERS[instr.args[1]].format(a=arguments[0])
        if op in BINARY:
            a, b = (f"({a})" for a in arguments)
            return _BINARY[op].format(a=a, b=b, dt=self.dt)
        if op == "where":
            c, a, b = arguments
            return f"f.select({c}, {a}, {b})"
        if op == "fill":
            return self._constant(float(attrs["value"]), block.shape)
        if op == "cast":
            return {
                "int": f"f.trunc({arguments[0]})",
                "bool": f"({arguments[0]} != 0.0).to({self.dt})",
            }.get(attrs["kind"], arguments[0])
        return self._grouped(instr, arguments, stage, block)

    def _grouped(self, instr: Instr, arguments: list[str], stage: Stage, block: _Block) -> str:
        op, n, axis = instr.op, stage.width, block.axis
        there = f"{block.mask}, {axis}"
        x = f"tl.broadcast_to({arguments[0]}, {block.shape})"
        if op == "sum":
            return f"f.total({x}, {there})"
        if op == "mean":
            return f"f.total({x}, {there}) / {n}"
        if op in ("max", "min"):
            return f"f.{'largest' if op == 'max' else 'smallest'}({x}, {there})"
        if op in ("argmax", "argmin"):
            sign = "-" if op == "argmin" else ""
            return f"f.argmax({sign}{x}, {block.mask}, o_n{block.along}, {axis})"
        if op in ("logsumexp", "softmax", "log_softmax"):
            return f"f.{op}({x}, {there})"
        if op in ("softmax_grad", "log_softmax_grad"):
            return f"f.{op}({x}, {arguments[1]}, {there})"

        def weight(position: int) -> str:
            val = instr.args[position]
            assert isinstance(val, Val)
            columns, mask = f"o_n{block.along}", f"(o_n < {n}){block.along}"
            return self._load_at(self.plan.place(val), block, columns, mask)

        eps = self._constant(float(instr.attrs["eps"]))
        if op == "layer_norm":
            text = f"f.normalized({x}, {block.mask}, {n}, {eps}, {axis})"
            text += f" * {weight(1)}" if instr.args[1] is not None else ""
            return text + (f" + {weight(2)}" if instr.args[2] is not None else "")
        assert op == "layer_norm_grad", op
        g = x + (f" * {weight(2)}" if instr.args[2] is not None else "")
        return f"f.layer_norm_grad({g}, {arguments[1]}, {block.mask}, {n}, {eps}, {axis})"

    # -- gathers: columns of the result are `block.columns`

    def _gathered(self, val: Val, block: _Block, columns: str, mask: str = "") -> str:
        return self._load_at(self.plan.place(val), block, columns, _both(block.mask, mask))

    def _from(self, columns: str, block: _Block, other: int) -> str:
        """Columns to gather from, by a map; in a variable of their own, for shapes differ."""
        name = f"o_from{self.loads}"
        self.loads += 1
        self.line(f"{name} = tl.load(p_maps + {columns}{_masked(block.mask, f'other={other}')})")
        return name

    def _map(self, indices: Iterable[int]) -> int:
        key = tuple(indices)
        if key not in self.map_at:
            self.map_at[key] = len(self.maps)
            self.maps += key
        return self.map_at[key]

    def _index(self, instr: Instr, block: _Block) -> str:
        at = self._map(instr.attrs["map"])
        (x,) = instr.values()
        return self._gathered(x, block, self._from(f"({at} + {block.columns})", block, 0))

    def _index_add(self, instr: Instr, block: _Block) -> str:
        """For each column those that are added up there, in order."""
        (g,) = instr.values()
        width = math.prod(instr.attrs["shape"])
        sources: list[list[int]] = [[] for _ in range(width)]
        for j, i in enumerate(instr.attrs["map"]):
            sources[i].append(j)
        most = max(map(len, sources))
        at = self._map(s[k] if k < len(s) else -1 for k in range(most) for s in sources)
        self.line(f"total = tl.zeros({block.shape}, {self.dt})")
        if most:
            self.line(f"for i_a in range({most}):")
            self.depth += 1
            name = self._from(f"({at} + i_a * {width} + {block.columns})", block, -1)
            self.line(f"total += {self._gathered(g, block, name, f'({name} >= 0)')}")
            self.depth -= 1
        return "total"

    def _index_of(self, index: Val, block: _Block, group: str) -> str:
        """The index that each column's group has."""
        place = self.plan.place(index)
        if self.program.type(index).width == 1:
            return self._load_at(place, block, _FIRST, "")
        return self._load_at(place, block, group, block.mask)

    def _one_hot(self, instr: Instr, block: _Block) -> str:
        (index,) = instr.values()
        n = instr.attrs["n"]
        at = self._index_of(index, block, f"({block.columns} // {n})")
        return f"({at} == ({block.columns} % {n}).to({self.dt})).to({self.dt})"

    def _take(self, instr: Instr, block: _Block) -> str:
        x, index = instr.values()
        m, n = self.program.type(x).shape[-2:]
        group = f"({block.columns} // {n})"
        at = f"f.index({self._index_of(index, block, group)}, {m})"
        return self._gathered(x, block, f"(({group} * {m} + {at}) * {n} + {block.columns} % {n})")

    def _put(self, instr: Instr, block: _Block) -> str:
        g, index = instr.values()
        m = instr.attrs["m"]
        n = self.program.type(g).shape[-1]
        group = f"({block.columns} // {m * n})"
        at = f"f.index({self._index_of(index, block, group)}, {m})"
        here = f"(({block.columns} // {n}) % {m} == {at})"
        value = self._gathered(g, block, f"({group} * {n} + {block.columns} % {n})")
        return f"tl.where({here}, {value}, 0.0)"


_POWERS = {
    1.0: "{a}", 2.0: "{a} * {a}", 3.0: "{a} * {a} * {a}", 0.5: "tl.sqrt({a})",
    -1.0: "1.0 / {a}", -0.5: "1.0 / tl.sqrt({a})",
}  # fmt: skip


def _both(*masks: str) -> str:
    return " & ".join(mask for mask in masks if mask)


def _masked(mask: str, more: str = "") -> str:
    """The arguments of a load or store for a mask, if there is one."""
    if not mask:
        return ""
    return f", mask={mask}, {more}" if more else f", mask={mask}"


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
