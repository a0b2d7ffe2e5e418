"""The schema of recorded rows."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fastwm.bench import rows
from tests.bench.samples import memory_row, time_row


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    written = [time_row(), memory_row()]
    rows.append(tmp_path / "new" / "mlp.jsonl", written[:1])
    rows.append(tmp_path / "new" / "mlp.jsonl", written[1:])
    assert list(rows.read(tmp_path / "new" / "mlp.jsonl")) == written


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert list(rows.read(tmp_path / "none.jsonl")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "schema 0"),
        ({"kind": "guess"}, "kind 'guess'"),
        ({"median_ms": None}, "median_ms"),
        ({"median_ms": "fast"}, "median_ms"),
        ({"samples_ms": [1.0, "2"]}, "samples_ms"),
        ({"batch": 1.5}, "batch"),
        ({"ours": 1}, "ours"),
        ({"surprise": 1}, "surprise"),
        ({"commit": ...}, "commit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_row_that_does_not_fit_the_schema_is_named(change: dict[str, Any], message: str) -> None:
    raw = asdict(time_row())
    rows.parse(raw)
    for name, value in change.items():
        if value is ...:
            del raw[name]
        else:
            raw[name] = value
    with pytest.raises(ValueError, match=message):
        rows.parse(raw)


def test_a_bad_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "mlp.jsonl"
    rows.append(path, [time_row()])
    path.write_text(path.read_text() + json.dumps({"schema": rows.SCHEMA}) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        list(rows.read(path))


def test_nothing_is_written_when_a_row_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "mlp.jsonl"
    with pytest.raises(ValueError, match="gflop"):
        rows.append(path, [time_row(), time_row(gflop="many")])
    assert not path.exists()


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        rows.append(tmp_path / "mlp.jsonl", [time_row(median_ms=float("nan"))])


def test_a_field_that_came_later_may_be_absent(tmp_path: Path) -> None:
    raw = asdict(time_row(gflop_done=3.0))
    del raw["gflop_done"]
    found = rows.parse(raw)
    assert isinstance(found, rows.TimeRow)
    assert found.gflop_done is None
