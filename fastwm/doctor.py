"""``python -m fastwm doctor``: what runs on this machine and, of what does not, why."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

import torch

import fastwm
from fastwm.engines import available
from fastwm.ops import cpu_isa, cpu_library

__all__ = ["main", "report"]

PACKAGES = (
    *("torch", "torchrl", "tensordict", "triton", "numpy", "jax", "gymnasium", "matplotlib"),
    "nvtx",
)
REINSTALL = "pip install --no-build-isolation --no-deps --force-reinstall ."


def report() -> str:
    """The whole report as text.

    Example:
        >>> from fastwm.doctor import report
        >>> "engines" in report()
        True
    """
    sections = {
        "versions": _versions(),
        "machine": _machine(),
        "C++ library": _cpp_library(),
        "instruction sets of the C++ kernels": _instruction_sets(),
        "Triton kernels": _triton_kernels(),
        "engines": ((e.name, e.usable, e.reason) for e in available()),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        for name, state, detail in rows:
            mark = {True: "yes", False: "no", None: ""}[state]
            lines.append(f"  {name:<24}{mark:<5}{detail}".rstrip())
        lines.append("")
    return "\n".join(lines)


# A row: what, whether it is usable (None: not a question), and how or why not.
Rows = Iterator[tuple[str, bool | None, str]]


def _versions() -> Rows:
    yield "fastwm", None, fastwm.__version__
    yield "Python", None, platform.python_version()
    for package in PACKAGES:
        try:
            yield package, None, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, None, "not installed"


def _machine() -> Rows:
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    yield "platform", None, f"{platform.system()} {platform.machine()}"
    yield "cores", None, f"{cores} usable of {os.cpu_count()}"
    yield "torch threads", None, str(torch.get_num_threads())
    yield "torch's CPU kernels", None, torch.backends.cpu.get_cpu_capability()
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch is built for CUDA {built}, but finds no device"
            if built
            else "this torch is built for the CPU alone"
        )
        yield "CUDA", False, why
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {device.total_memory / 2**30:.0f} GiB"
        yield f"cuda:{index}", True, f"{detail}, sm_{device.major}{device.minor}"


def _cpp_library() -> Rows:
    library = cpu_library()
    if library.loaded:
        yield "loaded", True, "on the CPU, fastwm's ops run in C++"
        return
    yield "loaded", False, f"{library.reason}; ops run on their references"
    if library.path is None:
        yield "why", None, _why_not_built()


def _why_not_built() -> str:
    """What stands in the way of a build, here and now."""
    compiler = os.environ.get("CXX") or next(
        (found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None
    )
    if compiler is None:
        return "no C++ compiler: CXX is not set, and there is no c++, g++ or clang++ on the PATH"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("int main() { auto f = []<typename T>(T x) { return x; }; return f(0); }")
        command = [*compiler.split(), "-std=c++20", "-c", str(source), "-o", f"{folder}/probe.o"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            return f"the C++ compiler {compiler} cannot be run: {error}"
        if run.returncode:
            said = (run.stderr or run.stdout).strip().splitlines()
            detail = said[0] if said else f"exit status {run.returncode}"
            return f"the C++ compiler {compiler} cannot compile C++20: {detail}"
    header = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "stable" / "c" / "shim.h"
    if not header.exists():
        return f"torch {torch.__version__} brings no stable ABI headers; 2.10 and later do"
    return f"not when fastwm was installed, but it can be built now: {REINSTALL}"


def _instruction_sets() -> Rows:
    widest = cpu_isa()
    order = ("portable", "avx2", "avx512")
    for name in reversed(order):
        if widest is None:
            yield name, False, "the C++ library is not loaded"
        elif order.index(name) <= order.index(widest):
            yield name, True, "widest of this CPU" if name == widest else ""
        else:
            yield name, False, "this CPU, or its operating system, does not have it"


def _triton_kernels() -> Rows:
    if importlib.util.find_spec("triton") is None:
        yield "triton", False, "not installed; the CPU builds of torch come without it"
    else:
        yield "triton", True, f"version {metadata.version('triton')}"
    cuda = torch.cuda.is_available()
    yield "on this machine", cuda, "" if cuda else "no CUDA device; the CPU has its own kernels"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m fastwm doctor", description=__doc__)
    parser.parse_args(argv)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
