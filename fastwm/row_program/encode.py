"""From a row program to the tables of integers that the C++ executor reads (csrc/row_code.h).

Every value gets a place: memory that all steps of a chunk share, memory of one section that is used again
once nobody reads the value any more, or, for carries, memory that persists. Widths are rounded up to whole
vectors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastwm.row_program.kinds import KINDS
from fastwm.row_program.ops import BINARY, PRODUCTS, SUMS, UNARY, UNARY_GRAD
from fastwm.row_program.program import Instr, Program, ProgramError, Val
from fastwm.row_program.room import Room
from fastwm.row_program.sections import one_section, sections

__all__ = ["Encoded", "encode"]

_VERSION = 2
_PAD = 16
# In the order of the enumerations in csrc/row_kernels.h.
_UNARY = [
    "neg", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "square", "abs", "sign", "floor",
    "ceil", "round", "trunc", "sin", "cos", "erf", "tanh", "sigmoid", "log_sigmoid", "relu", "silu", "mish",
    "gelu", "gelu_tanh", "leaky_relu", "softplus", "elu", "not", "isnan", "isfinite", "safe_tanh", "copy",
    "to_bool",
]  # fmt: skip
_UNARY_GRAD = [
    "tanh_grad", "sigmoid_grad", "relu_grad", "silu_grad", "mish_grad", "gelu_grad", "gelu_tanh_grad",
    "leaky_relu_grad", "softplus_grad", "elu_grad", "log_sigmoid_grad",
]  # fmt: skip
_BINARY = [
    "add", "sub", "mul", "div", "pow", "maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne", "and", "or",
    "xor", "clamp_min", "clamp_max",
]  # fmt: skip
_REDUCE = ["sum", "mean", "max", "min", "logsumexp", "argmax", "argmin"]
# In the order of csrc/row_code.h.
_SPACES = ["none", "chunk", "loop", "batch", "persist", "uniform", "immediate"]
_CODES = [
    "unary", "unary_grad", "binary", "where", "reduce", "softmax", "softmax_grad", "layer_norm",
    "layer_norm_grad", "linear", "grouped_linear", "member_linear", "outer", "grouped_outer", "member_outer",
    "row_sum", "member_row_sum", "slice", "index", "index_add", "concat", "one_hot", "take", "put", "fill",
    "load", "store", "check",
]  # fmt: skip
_ROLES = {"carry": 0, "step": 1, "context": 2}
_AHEAD, _LOOP, _AFTER = range(3)


@dataclass(frozen=True)
class _Place:
    space: str = "none"
    offset: int = 0
    ld: int = 0
    width: int = 0

    def words(self) -> list[int]:
        return [_SPACES.index(self.space), self.offset, self.ld, self.width]


_NOWHERE = _Place()


@dataclass
class Encoded:
    """A program ready for the executor.

    Attributes:
        code, immediates, maps: its tables (int64, float64, int64).
        inputs: names, in the order in which the tensors are passed.
        outputs, finals, sums: names, in that order among the tensors to be written.
        packed: elements of room for packed matrices.
        matrices: how many uniforms are packed.
    """

    code: torch.Tensor
    immediates: torch.Tensor
    maps: torch.Tensor
    inputs: list[Any]
    outputs: list[Any]
    finals: list[Any]
    sums: list[Any]
    packed: int
    matrices: int


def encode(
    program: Program,
    *,
    time_major: Collection[Any] = (),
    kinds: Mapping[Any, str] | None = None,
    stepwise: bool = False,
) -> Encoded:
    """Encode a program.

    Args:
        stepwise: leave nothing for before or after the loop over steps: for tall tiles, whose products are
            large enough, and whose values would not fit the caches if they were kept for several steps.
        time_major: step inputs whose tensors are ``[steps, rows, *shape]``.
        kinds: by output name, as what its tensor is written (``"float"``, ``"bool"``, ``"int"``); default:
            the value's kind.

    Raises:
        ProgramError: something that the executor has no code for.

    Example:
        >>> from fastwm.row_program import Program
        >>> from fastwm.row_program.encode import encode
        >>> p = Program()
        >>> p.carries["x"] = p.outputs["y"] = p.emit("tanh", p.input("x", "carry", (3,)))
        >>> encode(p).inputs
        ['x']
    """
    return _Encoder(program, frozenset(time_major), dict(kinds or {}), stepwise).run()


def _padded(width: int) -> int:
    return -(-width // _PAD) * _PAD


@dataclass
class _Line:
    """An instruction with values still in place of places."""

    code: str
    sub: int = 0
    out: int | None = None
    operands: list[int | _Place] = field(default_factory=list)
    attributes: list[int] = field(default_factory=list)
    in_place: bool = False  # the result may lie where an operand lay
    to: _Place | None = None  # where the result goes, if that is settled

    def reads(self) -> set[int]:
        return {o for o in self.operands if isinstance(o, int)}


def _copy(source: int | _Place, *, out: int | None = None, to: _Place | None = None) -> _Line:
    return _Line("slice", 0, out, [source], [0], to=to)


class _Encoder:
    def __init__(
        self, program: Program, time_major: frozenset, kinds: dict[Any, str], stepwise: bool
    ) -> None:
        self.program = program
        self.stepwise = stepwise
        self.time_major = time_major
        self.kinds = kinds
        self.immediates: list[float] = []
        self.maps: list[int] = []
        self.map_at: dict[tuple[int, ...], int] = {}
        self.vectors: dict[tuple[Any, int, int], list[int]] = {}
        self.uniform_elements = 0
        self.matrices: dict[tuple[Any, str], list[int]] = {}
        self.packed = 0
        self.scratch = _PAD
        self.names = {i.val.index: n for n, i in program.inputs.items()}
        self.roles = {i.val.index: i.role for i in program.inputs.values()}
        self.alias: dict[int, int] = {}
        self.places: dict[int, _Place] = {}
        self.stacked: dict[int, _Place] = {}  # a carry's value at each step of the chunk
        self.persist: dict[int, _Place] = {}  # a carry's value from step to step

    # -- small things

    def root(self, val: Val | int) -> int:
        index = val if isinstance(val, int) else val.index
        while index in self.alias:
            index = self.alias[index]
        return index

    def width(self, index: int) -> int:
        return self.program.types[index].width

    def immediate(self, value: float) -> int:
        self.immediates.append(float(value))
        return len(self.immediates) - 1

    def parameters(self, values: list[float]) -> int:
        if not values:
            return -1
        first = len(self.immediates)
        self.immediates += [float(v) for v in values] + [0.0] * (3 - len(values))
        return first

    def map(self, indices: tuple[int, ...]) -> int:
        if indices not in self.map_at:
            self.map_at[indices] = len(self.maps)
            self.maps += indices
        return self.map_at[indices]

    def vector(self, val: Val, rows: int = 1) -> _Place:
        name, type = self.names[val.index], self.program.type(val)
        columns = max(1, type.width) // rows
        key = (name, rows, columns)
        if key not in self.vectors:
            offset = self.uniform_elements
            self.vectors[key] = [rows, columns, offset, KINDS.index(type.kind)]
            self.uniform_elements += rows * _padded(columns)
        return _Place("uniform", self.vectors[key][2], 0, columns)

    def matrix(self, val: Val, layout: str) -> int:
        """The number of a uniform that is one matrix or several."""
        key = (self.names[val.index], layout)
        if key not in self.matrices:
            shape = self.program.type(val).shape
            n, k = shape[-2:] if layout == "nk" else shape[:-3:-1]
            count = math.prod(shape[:-2])
            self.matrices[key] = [count, k, n, int(layout == "nk"), self.packed]
            self.packed += count * k * _padded(n)
        return list(self.matrices).index(key)

    # -- instructions

    def operand(self, arg: Any) -> int | _Place:
        if arg is None:
            return _NOWHERE
        if not isinstance(arg, Val):
            return _Place("immediate", self.immediate(arg), 0, 1)
        if self.roles.get(arg.index) == "uniform":
            return self.vector(arg)
        return self.root(arg)

    def line(self, instr: Instr) -> _Line | None:
        op, args, attrs = instr.op, instr.args, instr.attrs
        out = None if instr.out is None else instr.out.index
        types = [self.program.type(a) if isinstance(a, Val) else None for a in args]
        first = types[0] if types else None

        def groups(position: int = 0) -> list[int]:
            shape = types[position].shape  # type: ignore[union-attr]
            return [math.prod(shape[:-1]), shape[-1]]

        def plain(code: str, attributes: list[int], sub: int = 0, in_place: bool = False) -> _Line:
            operands = [self.operand(a) for a in args]
            return _Line(code, sub, out, operands, attributes, in_place)

        def elementwise(code: str, sub: int, *attributes: int) -> _Line:
            return plain(code, list(attributes), sub, in_place=True)

        if op in ("reshape", "detach") or (op == "cast" and self._same(instr)):
            assert out is not None
            assert isinstance(args[0], Val)
            self.alias[out] = self.root(args[0])
            return None
        if op == "cast":
            sub = "to_bool" if attrs["kind"] == "bool" else "trunc"
            return elementwise("unary", _UNARY.index(sub), self.parameters([]))
        if op in UNARY:
            params = self.parameters([attrs[k] for k in UNARY[op][1]])
            return elementwise("unary", _UNARY.index(op), params)
        if op in UNARY_GRAD:
            params = self.parameters([attrs[k] for k in UNARY_GRAD[op][1]])
            return elementwise("unary_grad", _UNARY_GRAD.index(op), params)
        if op in BINARY:
            return elementwise("binary", _BINARY.index(op))
        if op == "where":
            return plain("where", [])
        if op in _REDUCE:
            return plain("reduce", groups(), _REDUCE.index(op))
        if op in ("softmax", "log_softmax"):
            return plain("softmax", groups(), int(op == "log_softmax"))
        if op in ("softmax_grad", "log_softmax_grad"):
            return plain("softmax_grad", groups(), int(op == "log_softmax_grad"))
        if op in ("layer_norm", "layer_norm_grad"):
            at = 0 if op == "layer_norm" else 1
            return plain(op, [*groups(at), self.immediate(attrs["eps"])])
        if op in PRODUCTS:
            assert out is not None
            return self._product(instr, out, first)
        if op in SUMS:
            return self._sum(instr, types)
        if op == "index":
            return self._index(instr, out)
        if op == "index_add":
            return plain("index_add", [self.map(attrs["map"])])
        if op == "concat":
            return plain("concat", [])
        if op == "one_hot":
            return plain("one_hot", [first.width, attrs["n"]])  # type: ignore[union-attr]
        if op == "take":
            return plain("take", [math.prod(first.shape[:-2]), *first.shape[-2:]])  # type: ignore[union-attr]
        if op == "put":
            return plain("put", [math.prod(first.shape[:-1]), attrs["m"], first.shape[-1]])  # type: ignore[union-attr]
        if op == "row":
            return plain("slice", [0])
        if op == "fill":
            return plain("fill", [self.immediate(attrs["value"])])
        raise ProgramError(f"the executor has no {op!r}")

    def _same(self, instr: Instr) -> bool:
        """Whether a cast changes nothing in how the numbers are held."""
        assert isinstance(instr.args[0], Val)
        before, after = self.program.type(instr.args[0]).kind, instr.attrs["kind"]
        return after == "float" or before == after or (after == "int" and before == "bool")

    def _product(self, instr: Instr, out: int, x: Any) -> _Line:
        args, attrs, op = instr.args, instr.attrs, instr.op
        weight, bias = args[1], args[2]
        assert isinstance(weight, Val)
        number = self.matrix(weight, attrs["layout"])
        count = math.prod(self.program.type(weight).shape[:-2])
        k, n = x.shape[-1], self.program.types[out].shape[-1]
        groups = count if op == "grouped_linear" else math.prod(x.shape[:-1])
        alike = op == "grouped_linear" and len(x.shape) == 1
        act = attrs.get("act")
        params = attrs.get("act_params") or {}
        tail = [
            -1 if act in (None, "detach") else _UNARY.index(act),
            self.parameters([params[p] for p in UNARY[act][1]] if act else []),
        ]
        if op == "member_linear" or groups > 1:
            self.scratch = max(self.scratch, _padded(k) + _padded(n))
        place = (
            _NOWHERE if bias is None else self.vector(bias, count)  # type: ignore[arg-type]
        )
        operands: list[int | _Place] = [self.operand(args[0]), place]
        if op == "member_linear":
            operands.append(self.operand(args[3]))
        return _Line(op, 0, out, operands, [number, groups, int(alike), *tail])

    def _sum(self, instr: Instr, types: list[Any]) -> _Line:
        op, attrs = instr.op, instr.attrs
        number = list(self.program.sums).index(attrs["target"])
        columns = (self.program.sums[attrs["target"]].shape or (1,))[-1]
        operands = [self.operand(a) for a in instr.args]
        if op in ("row_sum", "member_row_sum"):
            if op == "member_row_sum" and columns != types[0].width:
                raise ProgramError("a member's sum of another width")
            return _Line(op, 0, None, operands, [number])
        k, n = types[0].shape[-1], types[1].shape[-1]
        nk = attrs["layout"] == "nk"
        if columns != (k if nk else n):
            raise ProgramError("a sum of outer products of another shape")
        if op != "outer" or math.prod(types[1].shape[:-1]) > 1:
            self.scratch = max(self.scratch, _padded(k) + _padded(n))
        if op == "member_outer":
            return _Line(op, 0, None, operands, [number, int(nk), attrs["members"], k, n])
        groups = math.prod(types[1].shape[:-1])
        alike = op == "grouped_outer" and len(types[0].shape) == 1
        return _Line(op, 0, None, operands, [number, int(nk), groups, k, n, int(alike)])

    def _index(self, instr: Instr, out: int | None) -> _Line | None:
        indices = tuple(instr.attrs["map"])
        first = indices[0] if indices else 0
        if indices == tuple(range(first, first + len(indices))):
            assert isinstance(instr.args[0], Val)
            assert out is not None
            if first == 0 and len(indices) == self.program.type(instr.args[0]).width:
                self.alias[out] = self.root(instr.args[0])
                return None
            return _Line("slice", 0, out, [self.operand(instr.args[0])], [first])
        return _Line("index", 0, out, [self.operand(instr.args[0])], [self.map(indices)])

    # -- the whole

    def _check(self) -> None:
        """What the builder lets pass: it checks instructions only."""
        program = self.program
        for given in program.inputs.values():
            if given.name in self.time_major and given.role != "step":
                raise ProgramError(f"{given.name!r} is of no step, it cannot be time major")
        for name, val in program.carries.items():
            item = program.inputs.get(name)
            if item is None or item.role != "carry":
                raise ProgramError(f"{name!r} is no carry")
            if program.type(val).width != program.type(item.val).width:
                raise ProgramError(f"the carry {name!r} gets a value of another width")
        for name in program.finals:
            if name not in program.inputs or program.inputs[name].role != "carry":
                raise ProgramError(f"{name!r} is no carry, it has no last value")
        for val in program.roots():
            if self.roles.get(val.index) == "uniform":
                raise ProgramError(f"{val} is a uniform where a row value is wanted")
        for type in program.types.values():
            if type.width == 0:
                raise ProgramError("a value of no elements")

    def run(self) -> Encoded:
        program = self.program
        self._check()
        for instr in program.instrs:  # numbered alike whatever the order of execution
            if instr.op in PRODUCTS:
                weight = instr.args[1]
                assert isinstance(weight, Val)
                self.matrix(weight, instr.attrs["layout"])
        split = one_section(program) if self.stepwise else sections(program)
        lines: list[list[_Line]] = [[], [], []]
        home: dict[int, int] = {}
        for section, instrs in enumerate((split.ahead, split.loop, split.after)):
            for instr in instrs:
                line = self.line(instr)
                if line is not None:
                    lines[section].append(line)
                    if line.out is not None:
                        home[line.out] = section
        return self._assemble(lines, home)

    def _assemble(self, lines: list[list[_Line]], home: dict[int, int]) -> Encoded:
        program = self.program
        inputs = list(program.inputs.values())
        rows_in = [i for i in inputs if i.role != "uniform"]
        carries = [i.val.index for i in inputs if i.role == "carry"]
        chunk, persist = Room(), Room()
        for given in rows_in:
            if given.role == "carry":
                ld = _padded(self.width(given.val.index))
                place = _Place("persist", persist.take(ld), ld, self.width(given.val.index))
                self.persist[given.val.index] = self.places[given.val.index] = place
            else:
                home[given.val.index] = _LOOP if self.stepwise else _AHEAD

        following = {name: self.root(val) for name, val in program.carries.items()}
        used: dict[int, set[int]] = {}
        for section, body in enumerate(lines):
            for line in body:
                for index in line.reads():
                    used.setdefault(index, set()).add(section)
        for index in following.values():
            used.setdefault(index, set()).add(_LOOP)

        # What is read in a later section than the one that makes it lies there for every step of the chunk.
        kept: set[int] = set()
        for index, where in [*home.items(), *((i, _LOOP) for i in carries)]:
            if any(section > where for section in used.get(index, ())):
                kept.add(index)
        ends = set(map(self.root, (*program.outputs.values(), *program.checks)))
        loads: list[_Line] = []
        for number, given in enumerate(rows_in):
            index = given.val.index
            if given.role != "carry" and (index in used or index in ends):
                if not self.stepwise:
                    kept.add(index)
                loads.append(_Line("load", 0, index, [], [number]))
        for index in sorted(kept):
            ld = _padded(self.width(index))
            place = _Place("chunk", chunk.take(ld), ld, self.width(index))
            (self.stacked if index in carries else self.places)[index] = place

        ahead, loop, after = lines
        if self.stepwise:
            loop = _with_loads(loads, loop)
        else:
            ahead = loads + ahead
        first: list[_Line] = []  # at the start of a step, while the carries are what they were
        last: list[_Line] = []
        for index in carries:
            if index in self.stacked:
                first.append(_copy(self.places[index], to=self.stacked[index]))
        stores: dict[int, list[_Line]] = {}
        for number, val in enumerate(program.outputs.values()):
            stores.setdefault(self.root(val), []).append(
                _Line("store", 0, None, [self.root(val)], [number])
            )
        for number, val in enumerate(program.checks):
            stores.setdefault(self.root(val), []).append(
                _Line("check", 0, None, [self.root(val)], [number])
            )
        for index in carries:
            first += stores.pop(index, [])
        fresh = -1
        for name, index in following.items():
            carry = program.inputs[name].val.index
            if index == carry:
                continue
            source: int | _Place = index
            if index in carries:  # another carry's old value: kept until all have moved
                first.append(_copy(self.places[index], out=fresh))
                source, fresh = fresh, fresh - 1
            last.append(_copy(source, to=self.places[carry]))

        def with_stores(body: list[_Line]) -> list[_Line]:
            found: list[_Line] = []
            for line in body:
                found.append(line)
                if line.out is not None:
                    found += stores.pop(line.out, [])
            return found

        ahead, loop, after = with_stores(ahead), with_stores(loop), with_stores(after)
        if stores:
            raise ProgramError("an output that no instruction makes")
        loop = first + loop + last if (loop or first or last) else []
        batch = Room()
        sizes = [self._allocate(ahead, "batch", batch), self._allocate(loop, "loop", Room())]
        for index in carries:
            if index in self.stacked:  # sections after the loop read what was stacked
                self.places[index] = self.stacked[index]
        sizes.append(self._allocate(after, "batch", batch))
        return self._tables(rows_in, [ahead, loop, after], chunk.size, sizes, persist.size)

    def _allocate(self, body: list[_Line], space: str, room: Room) -> int:
        """Give every result its place and put places for values; returns the room needed."""
        final: dict[int, int] = {}
        for position, line in enumerate(body):
            for index in line.reads():
                final[index] = position
        own: set[int] = set()
        for position, line in enumerate(body):
            dying = [i for i in sorted(line.reads()) if i in own and final[i] == position]
            reads = line.operands
            line.operands = [self.places[o] if isinstance(o, int) else o for o in reads]
            if line.out is not None and line.out not in self.places:
                width = self._line_width(line)
                ld = _padded(width)
                taken = None
                if line.in_place:
                    # Elementwise: each vector is read before it is written.
                    taken = next(
                        (i for i in dying if self.places[i].ld == ld and self.places[i].width == width), None
                    )  # fmt: skip
                if taken is not None:
                    offset = self.places[taken].offset
                    dying.remove(taken)
                else:
                    offset = room.take(ld)
                self.places[line.out] = _Place(space, offset, ld, width)
                own.add(line.out)
            for index in dying:
                room.give(self.places[index].offset, self.places[index].ld)
            if line.out in own and line.out not in final:  # nobody reads it
                room.give(self.places[line.out].offset, self.places[line.out].ld)
        return room.size

    def _line_width(self, line: _Line) -> int:
        if line.out is not None and line.out < 0:  # a carry's old value
            (place,) = line.operands
            assert isinstance(place, _Place)
            return place.width
        assert line.out is not None
        return self.width(line.out)

    def _tables(
        self, rows_in: list[Any], bodies: list[list[_Line]], chunk: int, sizes: list[int], persist: int
    ) -> Encoded:  # fmt: skip
        program = self.program
        names = [i.name for i in rows_in]
        uniforms = [i.name for i in program.inputs.values() if i.role == "uniform"]
        inputs = [*names, *uniforms]
        at = {name: position for position, name in enumerate(inputs)}
        words: list[int] = []
        for given in rows_in:
            type = program.type(given.val)
            place = self.places.get(given.val.index, _NOWHERE)
            if given.role == "carry":  # where it persists, not where it is stacked
                place = self.persist[given.val.index]
            words += [
                _ROLES[given.role], KINDS.index(type.kind), type.width, int(given.name in self.time_major),
                *place.words(), at[given.name],
            ]  # fmt: skip
        outputs, finals, sums = list(program.outputs), list(program.finals), list(program.sums)
        for number, name in enumerate(outputs):
            type = program.type(program.outputs[name])
            words += [KINDS.index(self.kinds.get(name, type.kind)), type.width, number]
        for number, name in enumerate(finals):
            words += [*self.persist[program.inputs[name].val.index].words(), len(outputs) + number]
        for (name, _, _), vector in self.vectors.items():
            words += [at[name], *vector]
        for (name, _), matrix in self.matrices.items():
            words += [at[name], *matrix]
        offset = 0
        for number, name in enumerate(sums):
            shape = program.sums[name].shape or (1,)
            rows, columns = math.prod(shape[:-1]), shape[-1]
            words += [rows, columns, offset, len(outputs) + len(finals) + number]
            offset += rows * _padded(columns)
        for body in bodies:
            for line in body:
                words += self._words(line)
        batch = max(sizes[0], sizes[2])
        item = 8 if program.dtype is torch.float64 else 4
        header = [
            _VERSION, len(rows_in), len(outputs), len(finals), len(self.vectors), len(self.matrices),
            len(sums), chunk, sizes[1], batch, persist, self.scratch,
            self.uniform_elements, offset, self.packed, *map(len, bodies),
            item * (chunk + sizes[1] + batch + persist + self.scratch),
        ]  # fmt: skip
        return Encoded(
            torch.tensor(header + words, dtype=torch.int64),
            torch.tensor(self.immediates or [0.0], dtype=torch.float64),
            torch.tensor(self.maps or [0], dtype=torch.int64),
            inputs, outputs, finals, sums, self.packed, len(self.matrices),
        )  # fmt: skip

    def _words(self, line: _Line) -> list[int]:
        out = line.to or (_NOWHERE if line.out is None else self.places[line.out])
        words = [
            _CODES.index(line.code),
            line.sub,
            *out.words(),
            len(line.operands),
            len(line.attributes),
        ]
        for operand in line.operands:
            assert isinstance(operand, _Place)
            words += operand.words()
        words += line.attributes
        return [len(words) + 1, *words]


def _with_loads(loads: list[_Line], body: list[_Line]) -> list[_Line]:
    """Each input loaded just before it is first read."""
    waiting = {line.out: line for line in loads}
    found: list[_Line] = []
    for line in body:
        found += [waiting.pop(i) for i in sorted(line.reads()) if i in waiting]
        found.append(line)
    return [*waiting.values(), *found]
