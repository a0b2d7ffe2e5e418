"""The C++ executor against the reference interpreter."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from fastwm.ops.library import cpu_isa, cpu_library
from fastwm.row_program import Program
from fastwm.row_program.executor import Executor
from fastwm.row_program.kinds import dtype_of
from fastwm.row_program.reference import Result, interpret
from fastwm.row_program.row_executor import RowExecutor

#: Instruction sets that this machine has: 0 portable, 1 AVX2, 2 AVX-512.
ISAS = range(1 + ("portable", "avx2", "avx512").index(cpu_isa() or "portable"))
WHY_NOT = "" if cpu_library().loaded else cpu_library().reason


@dataclass
class Ran:
    """What the executor gave, as :class:`fastwm.row_program.reference.Result` has it."""

    outputs: dict[Any, torch.Tensor]
    finals: dict[Any, torch.Tensor]
    sums: dict[Any, torch.Tensor]
    failed: int


def given_as(program: Program, inputs: Mapping[Any, torch.Tensor]) -> dict[Any, torch.Tensor]:
    """Inputs in the dtypes that the executor asks for."""
    return {
        n: inputs[n].to(dtype_of(program.type(i.val).kind, program.dtype)).contiguous()
        for n, i in program.inputs.items()
    }


def execute(
    program: Program,
    inputs: Mapping[Any, torch.Tensor],
    rows: int,
    steps: int,
    *,
    reverse: bool = False,
    isa: int | None = None,
    time_major: Collection[Any] = (),
    kinds: Mapping[Any, str] | None = None,
    executor: Executor | None = None,
    bf16: bool = False,
) -> Ran:
    """Run a program in C++, its results into buffers full of NaN."""
    executor = executor or Executor(program, isa=isa, time_major=time_major, kinds=kinds, bf16=bf16)
    spoil_scratch()
    return run_on(executor, inputs, rows, steps, reverse=reverse, time_major=time_major)


def run_on(
    executor: RowExecutor,
    inputs: Mapping[Any, torch.Tensor],
    rows: int,
    steps: int,
    *,
    reverse: bool = False,
    time_major: Collection[Any] = (),
    device: str = "cpu",
    keys: Mapping[Any, torch.Tensor] | None = None,
) -> Ran:
    """Run an executor's program, its results into buffers full of NaN; they come back to the CPU.

    ``keys`` are given in the place of inputs that the executor draws itself.
    """
    program, keys = executor.program, dict(keys or {})
    given = {n: t.to(device) for n, t in given_as(program, {**inputs, **keys}).items()}
    for name in time_major:
        given[name] = given[name].transpose(0, 1).contiguous()
    given |= {name: key.to(device) for name, key in keys.items()}
    outputs = executor.empty(rows, steps)
    for t in outputs:
        t.fill_(torch.nan if t.is_floating_point() else True if t.dtype is torch.bool else -77)
    outputs, failed = executor.run(
        [given[n] for n in executor.inputs], rows, steps, reverse=reverse, outputs=outputs
    )
    found = iter([t.cpu() for t in outputs])
    return Ran(
        {n: next(found) for n in program.outputs},
        {n: next(found) for n in program.finals},
        {n: next(found) for n in program.sums},
        failed,
    )


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spoil_scratch() -> None:
    """Fill this thread's scratch with NaN, so that what is read of padding shows."""
    executor, x, outputs = _spoiler()
    executor.run([x], len(x), 1, outputs=outputs)


@cache
def _spoiler() -> tuple[Executor, torch.Tensor, list[torch.Tensor]]:
    p = Program()
    p.outputs["y"] = p.emit("sum", p.emit("neg", p.input("x", "context", (1 << 12,))))
    executor = Executor(p)
    x = torch.full((8, 1 << 12), torch.nan)
    return executor, x, executor.empty(8, 1)


def assert_ran(ran: Ran, want: Result, *, rtol: float, atol: float = 0.0) -> None:
    """Everything within ``rtol`` of the largest of its tensor."""
    assert bool(ran.failed) is not want.ok
    for what in ("outputs", "finals", "sums"):
        got_all, want_all = getattr(ran, what), getattr(want, what)
        assert got_all.keys() == want_all.keys()
        for name, got in got_all.items():
            assert_near(got, want_all[name], rtol, atol, f"{what} {name}")


def assert_near(
    got: torch.Tensor, want: torch.Tensor, rtol: float, atol: float = 0.0, name: str = "", *,
    scaled: bool = True,
) -> None:  # fmt: skip
    """Within ``rtol`` of the largest of the tensor (``scaled``) or of each element."""
    assert got.shape == want.shape, (name, got.shape, want.shape)
    got, want = got.double(), want.detach().double()
    if scaled and want.numel():
        largest = want.abs().max().item()
        if math.isfinite(largest):
            atol = max(atol, rtol * largest)
            if ((got - want).abs() <= atol).all():  # the quick way
                return
    torch.testing.assert_close(
        got, want, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def check(
    program: Program,
    inputs: Mapping[Any, torch.Tensor],
    rows: int,
    steps: int,
    *,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.float64),
    isas: Iterable[int] = ISAS,
    reverse: bool = False,
    rtol: float = 3e-5,
    executors: dict[Any, Executor] | None = None,
    **kwargs: Any,
) -> None:
    """On every instruction set and in both dtypes, against the interpreter in float64."""
    wide = replace(program, dtype=torch.float64)
    with torch.no_grad():
        want = interpret(wide, inputs, steps, reverse=reverse)
    for dtype in dtypes:
        typed = replace(program, dtype=dtype)
        for isa in isas:
            executor = None
            if executors is not None and not kwargs:
                if (dtype, isa) not in executors:
                    executors[dtype, isa] = Executor(typed, isa=isa)
                    # Half of the small batches run as tall ones do, without sections.
                    if len(executors) % 2:
                        executors[dtype, isa].encoded = executors[dtype, isa]._stepwise
                executor = executors[dtype, isa]
            ran = execute(
                typed, inputs, rows, steps, reverse=reverse, isa=isa, executor=executor, **kwargs
            )
            try:
                single = dtype is torch.float32
                assert_ran(
                    ran, want, rtol=rtol if single else 1e-11, atol=1e-6 if single else 1e-14
                )
            except AssertionError as error:
                how = f"{dtype}, isa {isa}, rows {rows}, steps {steps}, reverse {reverse}"
                raise AssertionError(f"{how}: {error}\n{program}") from error
