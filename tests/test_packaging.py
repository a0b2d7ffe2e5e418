"""What pip installs: the wheel, in an environment outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    base = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "CXX", "CC")
    }
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**base, **env},
        capture_output=True,
        text=True,
    )


def build(folder: Path, **env: str) -> Path:
    """A wheel of the checkout's files, built beside the checkout and not in it."""
    source = folder / "source"
    for name in ("fastwm", "kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist")
    done = run(sys.executable, "-m", "pip", "wheel", *options, source, cwd=folder, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel; all else is borrowed from this one, not downloaded again."""
    environment = folder / "environment"
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    site = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
        ).stdout.strip()
    )
    with zipfile.ZipFile(wheel) as archive:  # what pip does with a wheel that has no scripts
        archive.extractall(site)
    # A plain path in a .pth file: its own .pth files, such as an editable fastwm's, are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


IMPORT_ALL = """
import importlib, os, pkgutil, sys
import fastwm
modules = [m.name for m in pkgutil.walk_packages(fastwm.__path__, "fastwm.")]
for name in modules:
    if name != "fastwm.__main__":
        importlib.import_module(name)
print(os.path.dirname(fastwm.__file__))
print(fastwm.ops.cpu_library().loaded)
print(" ".join(modules))
"""


def modules_of_the_checkout() -> set[str]:
    found = set()
    for folder, package in ((ROOT / "fastwm", "fastwm"), (ROOT / "kernels", "fastwm.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            found.add(name)
    return found - {"fastwm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("c++") is None and "CXX" not in os.environ:
        pytest.skip("no C++ compiler here: the wheel with the library cannot be built")
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_is_for_any_python_on_this_platform(wheel: Path) -> None:
    assert re.fullmatch(r"fastwm-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert [name for name in names if name.endswith((".so", ".dylib", ".dll"))] == [
        name for name in names if "libfastwm_cpu" in name or "fastwm_cpu.dll" in name
    ]
    assert {"fastwm/py.typed", "fastwm/kernels/__init__.py"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "fastwm",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_every_module_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    python = install(wheel, tmp_path)
    done = run(python, "-c", IMPORT_ALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, loaded, modules = done.stdout.splitlines()[-3:]
    assert Path(where).is_relative_to(tmp_path)
    assert loaded == "True"
    assert set(modules.split()) == modules_of_the_checkout()


@pytest.mark.slow
def test_without_a_compiler_it_installs_and_says_why(tmp_path: Path) -> None:
    false = shutil.which("false") or "/bin/false"
    no_compiler = {"CC": false, "CXX": false}
    wheel = build(tmp_path, **no_compiler)
    assert wheel.name.endswith("-py3-none-any.whl"), wheel.name
    python = install(wheel, tmp_path)
    code = """
import torch, fastwm
x = torch.rand(3, 4, 1, requires_grad=True)
fastwm.lambda_return(0.9, 0.9, x, x, x > 2).sum().backward()
print(fastwm.ops.cpu_library().loaded, x.grad.isfinite().all().item())
"""
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
    doctor = run(python, "-m", "fastwm", "doctor", cwd=tmp_path, **no_compiler)
    assert doctor.returncode == 0, doctor.stderr
    assert "installed without its C++ library" in doctor.stdout
    assert f"{false} cannot compile C++20" in doctor.stdout


def test_the_pinned_versions_are_those_installed() -> None:
    """Figures and tests speak of the versions in constraints.txt; a drift should be seen."""
    from importlib import metadata

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    for name in ("torch", "torchrl", "tensordict"):
        assert metadata.version(name).split("+")[0] == pins[name]
