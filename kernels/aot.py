"""Compile every Triton kernel ahead of time, with no GPU, and hold it to the limits of the chips.

Triton compiles for a chip that is not there but checks no limit: a kernel that asks for more shared
memory than a multiprocessor has, or spills registers, is found here and not on a user's machine.

    python -m fastwm.kernels.aot                       a table
    python -m fastwm.kernels.aot --record FILE.jsonl   and the same as rows
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastwm.kernels import MODULES, Build

__all__ = ["SHARED_LIMIT", "compile_all", "faults", "main"]

# Most dynamic shared memory that one block may have, in bytes (CUDA C++ Programming Guide, table of
# technical specifications per compute capability: 163, 227 and 227 KiB).
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


def compile_all(
    capabilities: tuple[int, ...] = tuple(SHARED_LIMIT), match: str = ""
) -> Iterator[dict[str, Any]]:
    """Compile every build of every kernel file for each compute capability; yield a row each.

    Args:
        match: only builds in whose kernel and variant this regular expression is found.

    Raises:
        RuntimeError: Triton's interpreter is on, in which kernels are Python functions and nothing
            is compiled.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: nothing can be compiled ahead of time.")
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache  # a warm cache would hide what no longer compiles
        for name in MODULES:
            module = importlib.import_module(f"fastwm.kernels.{name}")
            for build in module.builds():
                if not re.search(match, f"{build.kernel.fn.__name__} {build.variant}"):
                    continue
                for capability in capabilities:
                    yield _compile(build, capability)


def faults(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel; nothing, if it is fit to ship."""
    found = []
    if row["spill_stores"] + row["spill_loads"] > row.get("spill_limit", 0):
        found.append(f"spills {row['spill_stores']} + {row['spill_loads']} bytes of registers")
    if row["shared"] > row["shared_limit"]:
        found.append(f"asks for {row['shared']} bytes of shared memory of {row['shared_limit']}")
    return found


def _compile(build: Build, capability: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(build.kernel, build.signature, build.constexprs)
    start = time.perf_counter()
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), dict(build.options))
    seconds = time.perf_counter() - start
    products = re.findall(r"\b(?:mma|wgmma)[.\w:]*", compiled.asm["ptx"])
    return {
        "kernel": build.kernel.fn.__name__,
        "variant": build.variant,
        "arch": f"sm_{capability}",
        **build.options,
        "registers": _registers(compiled.asm["cubin"]),
        **_spills(compiled.asm["ptx"], build.options.get("enable_fp_fusion", True)),
        "spill_limit": build.spills,
        "tensor_core_products": len(products),
        # On sm_100 an instruction names the 16-bit kinds as one.
        "bf16_products": sum(".bf16.bf16" in p or p.endswith("kind::f16") for p in products),
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "cubin_bytes": len(compiled.asm["cubin"]),
        "compile_s": round(seconds, 2),
        "triton": triton.__version__,
    }


def _tool(name: str) -> str:
    """A tool of the CUDA toolkit that Triton brings along."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.findall(r"REG:(\d+)", text)[0])


def _spills(ptx: str, fmad: bool) -> dict[str, int]:
    arch = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)[0]
    # Triton brings a second assembler for the chips that its first is too old for.
    tool = _tool("ptxas-blackwell" if int(re.findall(r"\d+", arch)[0]) >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool, "-v", f"--gpu-name={arch}", file.name, "-o", os.devnull]
        command += [] if fmad else ["--fmad=false"]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    stores, loads = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)[0]
    return {"spill_stores": int(stores), "spill_loads": int(loads)}


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 when a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="python -m fastwm.kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED_LIMIT, default=[*SHARED_LIMIT]
    )
    parser.add_argument("--record", type=Path, help="write the rows to this file")
    parser.add_argument("--match", default="", help="only kernels and variants that hold this")
    args = parser.parse_args(argv)

    rows = []
    print(
        f"{'kernel':<26}{'variant':<30}{'arch':<8}{'registers':>9}{'spills':>8}{'shared':>8}{'s':>7}"
    )
    for row in compile_all(tuple(args.arch), args.match):
        rows.append(row)
        spills = row["spill_stores"] + row["spill_loads"]
        print(
            f"{row['kernel']:<26}{row['variant']:<30}{row['arch']:<8}{row['registers']:>9}"
            f"{spills:>8}{row['shared']:>8}{row['compile_s']:>7.2f}"
        )
        for fault in faults(row):
            print(f"  FAULT: {fault}")
    if args.record is not None:
        args.record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return int(any(faults(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
