"""The README's table of speeds, written from recorded rows: no figure is typed by hand.

python -m fastwm.bench.readme          rewrite what stands between the markers
python -m fastwm.bench.readme --check  exit 1 where it is not what the rows say
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from fastwm.bench.plots import conditions_of, latest
from fastwm.bench.rows import TimeRow, read

__all__ = ["block", "main", "rewritten"]

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
BATCHES = (1, 16, 256, 4096)
HORIZON = 15


def block(rows: Sequence[TimeRow]) -> str:
    """Milliseconds per rollout by provider, direction and batch, in Markdown, with the conditions.

    Args:
        rows: recorded timings; used are the latest of horizon 15 on one CPU thread.
    """
    chosen = [
        row
        for row in latest(rows)
        if isinstance(row, TimeRow)
        and (row.suite, row.device, row.threads, row.horizon) == ("mlp", "cpu", 1, HORIZON)
        and row.batch in BATCHES
    ]
    if not chosen:
        raise ValueError("no rows of the mlp suite on one CPU thread: run `make bench` first")
    lines = []
    for direction, title in (("forward", "no gradients"), ("backward", "forward + all gradients")):
        cells: dict[str, dict[int, str]] = defaultdict(dict)
        for row in chosen:
            if row.direction == direction:
                ratio = f" ({row.vs_reference:.1f}x)" if row.vs_reference else ""
                cells[row.provider][row.batch] = f"{row.median_ms:.3g}{ratio}"
        if not cells:
            continue
        lines += [
            f"| ms per rollout, {title} | " + " | ".join(f"B={b}" for b in BATCHES) + " |",
            "|---|" + "---|" * len(BATCHES),
        ]
        for provider, by_batch in cells.items():
            ours = any(r.provider == provider and r.ours for r in chosen)
            name = f"**{provider}**" if ours else provider
            lines.append(f"| {name} | " + " | ".join(by_batch.get(b, "") for b in BATCHES) + " |")
        lines.append("")
    lines += [f"<sub>{' '.join(conditions_of(chosen).split())}</sub>", ""]
    return "\n".join(lines)


def rewritten(text: str, new: str) -> str:
    """The README with ``new`` between the markers.

    Raises:
        ValueError: the markers are not there.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"no {BEGIN} ... {END} in the README")
    head, rest = text.split(BEGIN, 1)
    return head + BEGIN + "\n" + new + END + rest.split(END, 1)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastwm.bench.readme")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--rows", type=Path, default=Path("bench/results/mlp.jsonl"))
    options = parser.parse_args(argv)
    old = options.readme.read_text()
    rows = [row for row in read(options.rows) if isinstance(row, TimeRow)]
    new = rewritten(old, block(rows))
    if options.check:
        if new != old:
            print(f"{options.readme} does not say what {options.rows} says", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
