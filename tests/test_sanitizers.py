"""The C++ code of row programs under AddressSanitizer and UndefinedBehaviorSanitizer, without torch.

``tests/csrc/sanitize_row_program.cpp``, compiled with the kernels, runs programs dumped here in buffers of
their exact sizes, its scratch fresh and full of NaN, against the reference interpreter's results.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastwm.row_program import Program
from fastwm.row_program.encode import encode
from fastwm.row_program.gradient import differentiate
from fastwm.row_program.kinds import KINDS, dtype_of
from fastwm.row_program.reference import interpret
from tests.row_program.backward_inputs import gather
from tests.row_program.random_programs import random_program
from tests.row_program.test_executor import CASES, Build

ROOT = Path(__file__).parents[1]
MAIN = ROOT / "tests" / "csrc" / "sanitize_row_program.cpp"
FLAGS = (
    "-std=c++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all", "-Wno-psabi", "-Wno-maybe-uninitialized",
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma")
KERNELS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}


def _run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def executable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled once for the sources as they are; kept in pytest's cache."""
    compiler = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler (g++, c++ or clang++)")
    hello = tmp_path_factory.mktemp("hello") / "hello.cpp"
    hello.write_text("int main() { return 0; }\n")
    tried = _run(compiler, *FLAGS, hello, "-o", hello.with_suffix(""))
    if tried.returncode or _run(hello.with_suffix("")).returncode:
        pytest.skip(f"{compiler} has no working sanitizers: {tried.stderr[-300:]}")

    sources = [*sorted((ROOT / "csrc").glob("*.[ch]*")), MAIN]
    digest = hashlib.sha256(b"".join(s.read_bytes() for s in sources)).hexdigest()[:16]
    folder = request.config.cache.mkdir("sanitize") / digest  # type: ignore[union-attr]
    program = folder / "sanitize_row_program"
    if program.exists():
        return program
    folder.mkdir(parents=True, exist_ok=True)
    x86 = platform.machine() in ("x86_64", "AMD64")
    parts: list[tuple[Path, tuple[str, ...]]] = [(MAIN, ()), (ROOT / "csrc/cpu_features.cpp", ())]
    for name, flags in KERNELS.items():
        if x86 or name == "portable":
            flags = (*flags, "-ffp-contract=fast")
            parts.append((ROOT / f"csrc/row_kernels_{name}.cpp", flags))

    def compile_one(part: tuple[Path, tuple[str, ...]]) -> Path:
        source, flags = part
        out = folder / f"{source.stem}.o"
        define = ("-DFASTWM_X86",) if x86 else ()
        done = _run(compiler, *FLAGS, *define, *flags, "-c", source, "-o", out)
        assert done.returncode == 0, done.stderr
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, parts))
    done = _run(compiler, *FLAGS, *objects, "-o", folder / "linked", "-pthread")
    assert done.returncode == 0, done.stderr
    (folder / "linked").rename(program)
    return program


# ---------------------------------------------------------------- dumping


def _number(value: int) -> bytes:
    return struct.pack("<q", value)


def _block(data: bytes) -> bytes:
    return _number(len(data)) + data


def _bytes(t: torch.Tensor) -> bytes:
    return _block(t.contiguous().numpy().tobytes())


def dump(
    name: str, program: Program, inputs: Mapping[Any, torch.Tensor], rows: int, steps: int, *,
    reverse: bool = False, isa: int = 2, threads: int = 1, bf16: bool = False, stepwise: bool = False,
) -> bytes:  # fmt: skip
    """One case, with the interpreter's results."""
    encoded = encode(program, stepwise=stepwise)
    dtype = program.dtype
    given = []
    for n in encoded.inputs:
        kind = program.type(program.inputs[n].val).kind
        given.append(inputs[n].to(dtype_of(kind, dtype)))
    rounded = dict(inputs)
    if bf16:
        for n, item in program.inputs.items():
            if item.role == "uniform" and len(program.type(item.val).shape) > 1:
                rounded[n] = inputs[n].bfloat16()
    wide = replace(program, dtype=torch.float64)
    with torch.no_grad():
        want = interpret(wide, rounded, steps, reverse=reverse)
    results = []
    for n in encoded.outputs:
        kind = program.type(program.outputs[n]).kind
        results.append((KINDS.index(kind), want.outputs[n].to(dtype_of(kind, dtype))))
    results += [(0, want.finals[n].to(dtype)) for n in encoded.finals]
    results += [(0, want.sums[n].to(dtype)) for n in encoded.sums]
    found = _block(name.encode())
    double = dtype is torch.float64
    for value in (double, bf16, isa, reverse, rows, steps, threads):
        found += _number(int(value))
    found += struct.pack("<d", 1e-9 if double else 2e-3)
    found += _number(encoded.packed) + _number(encoded.matrices) + _number(int(not want.ok))
    found += _bytes(encoded.code) + _bytes(encoded.immediates) + _bytes(encoded.maps)
    found += _number(len(given)) + b"".join(map(_bytes, given))
    found += _number(len(results))
    return found + b"".join(_number(kind) + _bytes(t) for kind, t in results)


def by_op() -> Iterator[bytes]:
    """Every op, its forms by turns on the instruction sets, dtypes and widths."""
    for position, (name, make) in enumerate(CASES.items()):
        n = (1, 5, 16, 31, 7)[position % 5]
        rows = (1, 3, 17, 2)[position // 2 % 4]
        build = Build(n)
        program = build.finish(make, name.partition(":")[0])
        program.dtype = (torch.float32, torch.float64)[position // 3 % 2]
        yield dump(
            f"{name} of {n}, {rows} rows", program, build.inputs(rows, 3, position), rows, 3,
            isa=position % 3, reverse=position % 4 == 1, stepwise=position % 7 == 0,
        )  # fmt: skip


def at_random() -> Iterator[bytes]:
    """Random programs, forward and backward."""
    for seed in range(60):
        rows, steps = ((1, 3), (5, 2), (70, 3), (33, 1), (1, 1), (0, 2), (2, 0))[seed % 7]
        made = random_program(
            seed, depth=4 + seed % 14, max_width=(3, 17, 40)[seed % 3],
            dtype=(torch.float32, torch.float64)[seed % 2],
        )  # fmt: skip
        program, inputs = made.program, made.inputs(rows, steps, seed)
        how: dict[str, Any] = {
            "isa": seed // 2 % 3, "threads": 1 + seed % 2, "stepwise": seed % 5 == 0,
        }  # fmt: skip
        yield dump(f"random {seed}", program, inputs, rows, steps, **how)
        floats = [n for n, i in program.inputs.items() if program.type(i.val).kind == "float"]
        grads = [n for n, v in program.outputs.items() if program.type(v).kind == "float"]
        gradient = differentiate(program, floats, grads, budget=(None, 0.0)[seed % 2])
        with torch.no_grad():
            outputs = interpret(gradient.forward, inputs, steps).outputs
        given = {n: torch.randn(outputs[n].shape, dtype=program.dtype) for n in grads}
        backward = gather(gradient, inputs, outputs, given)
        yield dump(
            f"random {seed}, backward", gradient.backward, backward, rows, steps, reverse=True, **how
        )  # fmt: skip


def in_bfloat16() -> Iterator[bytes]:
    """Products alone: a wider program's other matrices would be rounded in the reference only."""
    for isa in range(3):
        for n in (1, 16, 37):
            for rows in (1, 9):
                p = Program()
                x, w = p.input("x", "step", (n,)), p.input("w", "uniform", (23, n))
                v = p.input("v", "uniform", (2, n, 5))
                p.outputs["y"] = p.emit("linear", x, w, p.input("b", "uniform", (23,)), layout="nk")
                p.outputs["z"] = p.emit("grouped_linear", x, v, None, layout="kn")
                g = torch.Generator().manual_seed(n)
                inputs = {
                    name: torch.randn(
                        (*((rows, 2) if item.role == "step" else ()), *p.type(item.val).shape), generator=g
                    )
                    for name, item in p.inputs.items()
                }  # fmt: skip
                yield dump(f"bfloat16 {n}, {rows} rows", p, inputs, rows, 2, isa=isa, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [by_op, at_random, in_bfloat16])
def test_no_sanitizer_complains(
    executable: Path, tmp_path: Path, cases: Callable[[], Iterator[bytes]]
) -> None:
    path = tmp_path / "cases"
    with path.open("wb") as file:
        for case in cases():
            file.write(case)
    done = _run(executable, path)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert " 0 failures" in done.stdout
