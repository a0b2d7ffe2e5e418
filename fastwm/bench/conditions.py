"""Under which conditions a row was measured: code, machine, versions. No host name and no path."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fastwm

__all__ = ["code_hash", "commit", "machine", "stamp", "versions"]

# pandas takes part by its absence: tensordict 0.14 looks for it along sys.path at each key that it writes,
# which is quick only once it is imported.
PACKAGES = ("torch", "torchrl", "tensordict", "numpy", "jax", "jaxlib", "triton", "pandas")
PACKAGE = Path(fastwm.__file__).parent


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def commit() -> tuple[str | None, bool | None]:
    """The checkout's commit and whether its code differs from that; (None, None) without git."""
    found = _git("rev-parse", "HEAD")
    if found is None:
        return None, None
    folders = (":/fastwm", ":/csrc", ":/kernels")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *folders)
    return found, bool(changed)


def code_hash() -> str:
    """A fingerprint of the code that is running: every source file of the package, kernels and C++
    included.

    Two runs with the same fingerprint timed the same code, committed or not.
    """
    digest = hashlib.sha256()
    roots = [PACKAGE, PACKAGE.parent / "csrc", PACKAGE.parent / "kernels"]
    for root in roots:
        for path in sorted(root.rglob("*")):
            # How results are drawn and printed changes no result.
            shown = path.parent.name == "bench" and path.stem in ("plots", "report", "cli")
            if path.suffix in (".py", ".cpp", ".h") and not shown:
                digest.update(path.relative_to(root.parent).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    """The hardware as far as it bears on speed."""
    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_used": len(affinity(0)) if affinity else None,
        "load": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def versions() -> dict[str, str | None]:
    """Python, fastwm and everything that takes part; None for what is not installed."""
    found: dict[str, str | None] = {"python": sys.version.split()[0], "fastwm": fastwm.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def stamp(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, commit and whether the code differs from that, for a row or a curve."""
    found, changed = commit()
    return {
        "machine": machine(device), "versions": versions(),
        "commit": found, "uncommitted_changes": changed,
    }  # fmt: skip
