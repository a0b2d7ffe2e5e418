"""Peak memory is measured right: checked against allocations of known size, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from fastwm.bench import cli, memory, rows

MIB = 1 << 20
WRITABLE = memory._CLEAR.exists() and os.access(memory._CLEAR, os.W_OK)
linux = pytest.mark.skipif(not WRITABLE, reason="no writable /proc/self/clear_refs on this system")

KNOWN = """
import json, torch
from fastwm.bench.memory import peak_of

def mib(n):
    return torch.ones(n << 18)

def temporary():
    gone, kept = mib(64), mib(16)
    del gone
    return kept, mib(8)

def workspace():
    own = mib(32)
    return lambda: own + 1

def result_of_a_view():
    return mib(4)[:1]

found = {
    "temporary": peak_of(lambda: temporary),
    "workspace": peak_of(workspace),
    "view": peak_of(lambda: result_of_a_view),
    "nothing": peak_of(lambda: lambda: None),
}
print(json.dumps({k: [v.peak_bytes, v.output_bytes, v.kept_bytes] for k, v in found.items()}))
"""


@linux
def test_known_allocations_are_found() -> None:
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, **memory.environment(), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KNOWN], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    near = MIB // 2

    def mib(name: str) -> list[float]:
        return [value / MIB for value in found[name]]

    # 64 and 16 at once, then 16 and 8.
    assert mib("temporary") == pytest.approx([80, 24, 0], abs=near / MIB)
    # The call itself allocates 32, and 32 stay with the provider between calls.
    assert mib("workspace") == pytest.approx([64, 32, 32], abs=near / MIB)
    # A view keeps all of its storage.
    assert mib("view") == pytest.approx([4, 4, 0], abs=near / MIB)
    assert mib("nothing") == pytest.approx([0, 0, 0], abs=near / MIB)


def test_a_process_that_was_not_prepared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    with pytest.raises(RuntimeError, match="cannot be measured"):
        memory.peak_of(lambda: lambda: None)


def test_shared_storage_is_counted_once() -> None:
    base = torch.zeros(1000)
    rollout = TensorDict({"a": base.view(10, 100), "next": {"a": base[:500].view(10, 50)}}, [10])
    assert memory.held_bytes(rollout) == 4000
    assert memory.held_bytes([base, {"again": base}, torch.zeros(5)]) == 4020


@linux
def test_the_command_records_peaks_of_a_rollout(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(
        "--memory --batch 512 --horizon 4 --providers torch-loop fastwm-captured --no-plot "
        f"--results {tmp_path}".split()
    )
    printed = capfd.readouterr().out
    assert status == 0, printed
    found = list(rows.read(tmp_path / "mlp.jsonl"))
    assert [row.provider for row in found] == ["torchrl", "torch-loop", "fastwm-captured"]
    output = 4 * 512 * 4 * (64 + 6 + 64 + 1)
    for row in found:
        assert isinstance(row, rows.MemoryRow)
        assert output <= row.output_bytes <= 1.05 * output
        assert row.output_bytes <= row.peak_bytes
        assert f"{row.peak_bytes / MIB:.1f}" in printed
    captured = found[2]
    assert isinstance(captured, rows.MemoryRow)
    # What the project promises, with a page or two of slack for Python's own objects.
    assert captured.peak_bytes <= captured.output_bytes + captured.step_bytes + MIB


@linux
def test_the_command_records_peaks_with_gradients(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(
        "--memory --direction backward --batch 512 --horizon 4 --providers fastwm-captured "
        f"--no-plot --results {tmp_path}".split()
    )
    printed = capfd.readouterr().out
    assert status == 0, printed
    reference, captured = rows.read(tmp_path / "mlp.jsonl")
    assert isinstance(reference, rows.MemoryRow)
    assert isinstance(captured, rows.MemoryRow)
    assert reference.vs_reference == 1
    assert captured.vs_reference == captured.peak_bytes / reference.peak_bytes
    # Activations of four steps, at least what autograd keeps of each layer, and all of it torch's.
    for row in (reference, captured):
        assert row.torch_bytes is not None
        assert 4 * row.step_bytes / 2 < row.torch_bytes < row.peak_bytes + MIB
    assert f"{captured.vs_reference:.2f}" in printed
