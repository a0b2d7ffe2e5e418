"""``python -m fastwm doctor`` and the command line it is a part of."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastwm
from fastwm import __main__ as cli
from fastwm import _requirements, doctor
from fastwm.engines import available
from fastwm.ops import CpuLibrary, cpu_isa, cpu_library


def lines_of(section: str) -> list[str]:
    """The lines of one section of the report."""
    blocks = {
        block.splitlines()[0]: block.splitlines()[1:] for block in doctor.report().split("\n\n")
    }
    return blocks[section]


def test_versions_are_those_that_run() -> None:
    versions = dict(line.split(maxsplit=1) for line in lines_of("versions"))
    assert versions["fastwm"] == fastwm.__version__
    assert versions["torch"] == torch.__version__
    assert versions["Python"] == ".".join(map(str, sys.version_info[:3]))


def test_a_package_that_is_not_installed_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("no-such-package",))
    assert lines_of("versions")[-1].split(maxsplit=1) == ["no-such-package", "not installed"]


def test_every_engine_is_listed_with_its_reason() -> None:
    lines = lines_of("engines")
    engines = available()
    assert len(lines) == len(engines)
    for line, engine in zip(lines, engines, strict=True):
        assert line.split(engine.name)[1].split()[0] == ("yes" if engine.usable else "no")
        assert engine.reason
        assert line.endswith(engine.reason)


def test_instruction_sets_are_those_of_the_cpu() -> None:
    if not cpu_library().loaded:
        pytest.skip(f"only the C++ library can ask the CPU: {cpu_library().reason}")
    lines = lines_of("instruction sets of the C++ kernels")
    usable = [line.split()[0] for line in lines if line.split()[1] == "yes"]
    assert usable[0] == cpu_isa()
    assert usable[-1] == "portable"
    flags = Path("/proc/cpuinfo")
    if flags.exists() and " flags" in flags.read_text().replace("\t", " "):
        has = set(flags.read_text().split("flags", 1)[1].splitlines()[0].split())
        assert ("avx2" in usable) == ({"avx2", "fma"} <= has)
        assert ("avx512" in usable) == ({"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has)


def without_library(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = CpuLibrary(None, False, "fastwm was installed without its C++ library")
    monkeypatch.setattr(doctor, "cpu_library", lambda: absent)
    monkeypatch.setattr(doctor, "cpu_isa", lambda: None)


def test_a_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_library(monkeypatch)
    assert not [line for line in lines_of("instruction sets of the C++ kernels") if " yes " in line]

    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    loaded, why = lines_of("C++ library")
    assert "no" in loaded.split()
    assert "no C++ compiler" in why

    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("CXX", str(broken))
    assert "cannot compile C++20: out of order" in lines_of("C++ library")[1]

    monkeypatch.setenv("CXX", str(tmp_path / "nowhere"))
    assert "cannot be run" in lines_of("C++ library")[1]


def test_with_a_compiler_it_says_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    without_library(monkeypatch)
    monkeypatch.delenv("CXX", raising=False)
    why = lines_of("C++ library")[1]
    if "no C++ compiler" in why:
        pytest.skip("no C++ compiler here")
    assert doctor.REINSTALL in why


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    assert "engines" in capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("doctor",))
    for wrong in ([], ["docter"]):
        assert cli.main(wrong) == 2
        said = capsys.readouterr().err
        assert all(name in said for name in (*cli.COMMANDS, *wrong))


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "fastwm", command, "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert f"fastwm {command}" in run.stdout


def test_what_is_missing_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _requirements.check()
    monkeypatch.setattr(_requirements, "REQUIRED", {"no-such-package": (1, 0), "torch": (99, 0)})
    with pytest.raises(ImportError) as caught:
        _requirements.check()
    said = str(caught.value)
    assert "no-such-package 1.0 or later, which is not installed" in said
    assert f"torch 99.0 or later, and finds {torch.__version__}" in said
