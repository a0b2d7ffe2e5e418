"""What is recorded: one JSON line per provider and configuration, enough to repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

__all__ = ["SCHEMA", "MemoryRow", "Row", "TimeRow", "append", "parse", "read"]

#: Raise it when a field changes its meaning; rows of another schema are refused, not guessed at. A
#: field that came later has a default, which older rows take.
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """What every row has.

    Args:
        kind: ``"time"`` or ``"memory"``.
        run: rows with the same ``run`` were measured in turns with each other.
        date: UTC, ISO 8601.
        commit, dirty: of the checkout; None where there is no git.
        code: fingerprint of the sources (:func:`fastwm.bench.conditions.code_hash`).
        command: what to type to measure it again.
        machine, versions: :mod:`fastwm.bench.conditions`.
        suite, batch, horizon, direction, threads, device, dtype: the configuration.
        provider, ours: who did it; ``ours`` is True for an engine of fastwm.
        parity: ``reference``, and per key ``worst`` (relative to the key's largest value) and
            ``used`` (part of the tolerance).
        absent: providers that were asked for and did not run, with the reason.
    """

    schema: int = SCHEMA
    kind: str
    run: str
    date: str
    commit: str | None
    dirty: bool | None
    code: str
    command: str
    machine: dict[str, Any]
    versions: dict[str, Any]
    suite: str
    batch: int
    horizon: int
    direction: str
    threads: int
    device: str
    dtype: str
    provider: str
    ours: bool
    parity: dict[str, Any]
    absent: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class TimeRow(Row):
    """A timing.

    Args:
        samples_ms: milliseconds per call, one number per round; ``calls`` calls per sample.
        cpu_share: processor time (all threads) over wall time: well below 1 on one thread means that
            the machine was busy with something else.
        median_ms, q1_ms, q3_ms: of the samples.
        vs_reference: times faster than torchrl's classes: median over rounds of the ratio.
        vs_best_peer, best_peer: the same against the best provider that is not ours.
        gflop: matrix products that one call needs. gflops: at the median.
        gflop_done: matrix products as the peers do them, needed or not.
        limits: the measured peak, how, and the read rate (:mod:`fastwm.bench.limits`).
        floor_ms: the larger of ``floor_compute_ms`` and ``floor_weights_ms``.
    """

    kind: str = "time"
    rounds: int
    calls: int
    samples_ms: list[float]
    cpu_share: float
    median_ms: float
    q1_ms: float
    q3_ms: float
    vs_reference: float | None
    vs_best_peer: float | None
    best_peer: str | None
    gflop: float
    gflops: float
    limits: dict[str, Any]
    floor_ms: float
    floor_compute_ms: float
    floor_weights_ms: float
    gflop_done: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryRow(Row):
    """Peak memory of one call.

    Args:
        peak_bytes: most memory held during the call beyond what is held without the provider.
        output_bytes: what the call returned.
        kept_bytes: part of the peak that the provider holds between calls.
        step_bytes: one step's intermediates, all kept.
        how: the method.
        vs_reference: peak as a part of torchrl's.
        torch_bytes: most that torch's own allocator held at once during the call; what other
            libraries allocate is not in it.
    """

    kind: str = "memory"
    peak_bytes: int
    output_bytes: int
    kept_bytes: int
    step_bytes: int
    how: str
    vs_reference: float | None = None
    torch_bytes: int | None = None


_KINDS: dict[str, type[Row]] = {"time": TimeRow, "memory": MemoryRow}


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    origin = get_origin(hint)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, get_args(hint)[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def parse(raw: dict[str, Any]) -> Row:
    """A row from what JSON gave.

    Raises:
        ValueError: another schema, an unknown kind, or a field that is missing, unknown or of the
        wrong type.
    """
    if raw.get("schema") != SCHEMA:
        raise ValueError(f"Row of schema {raw.get('schema')!r}; this version reads {SCHEMA}.")
    kind = _KINDS.get(raw.get("kind", ""))
    if kind is None:
        raise ValueError(f"Row of kind {raw.get('kind')!r}; known are {', '.join(_KINDS)}.")
    hints = get_type_hints(kind)
    names = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    missing, unknown = needed - set(raw), set(raw) - names
    if missing or unknown:
        raise ValueError(f"Row lacks {sorted(missing)} and has unknown {sorted(unknown)}.")
    for name in names & set(raw):
        if not _fits(raw[name], hints[name]):
            raise ValueError(f"Row's {name!r} is {raw[name]!r}, which is no {hints[name]}.")
    return kind(**raw)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of a file of JSON lines, after checking each against the schema."""
    lines = []
    for row in rows:
        raw = asdict(row)
        parse(raw)
        lines.append(json.dumps(raw, allow_nan=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(line + "\n" for line in lines)


def read(path: Path) -> Iterator[Row]:
    """Every row of a file, oldest first; nothing when there is no file.

    Raises:
        ValueError: a line that is no row, with its number.
    """
    if not path.exists():
        return
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            yield parse(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from None
