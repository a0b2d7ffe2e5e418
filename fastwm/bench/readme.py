"""The README's tables, written from recorded rows and curves: no figure is typed by hand.

python -m fastwm.bench.readme          rewrite what stands between the markers
python -m fastwm.bench.readme --check  exit 1 where it is not what the rows say
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastwm.bench.learned import learned
from fastwm.bench.plots import conditions_of, latest
from fastwm.bench.rows import TimeRow, read

__all__ = ["block", "main", "rewritten"]

BATCHES = (1, 16, 256, 4096)
HORIZON = 15
FAMILIES = {
    "mbpo": "MBPO ensemble (7 x 4 x 200)",
    "tdmpc2": "TD-MPC2 (latent 512)",
    "rssm": "Gaussian RSSM (200 + 30)",
    "rssm_v3": "categorical RSSM (512, 32 x 32)",
}


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


def families(rows: Sequence[TimeRow]) -> str:
    """Other model families: milliseconds of our quickest engine and of the best peer, in Markdown."""
    chosen = [
        row
        for row in latest(rows)
        if isinstance(row, TimeRow)
        and (row.device, row.threads, row.horizon) == ("cpu", 1, HORIZON)
        and row.suite in FAMILIES
    ]
    cases: dict[tuple[str, str], dict[int, list[TimeRow]]] = defaultdict(lambda: defaultdict(list))
    for row in chosen:
        cases[row.suite, row.direction][row.batch].append(row)
    batches = sorted({row.batch for row in chosen})
    lines = [
        "| ms per rollout: fused (ratio to the best peer) | "
        + " | ".join(f"B={b}" for b in batches)
        + " |",
        "|---|" + "---|" * len(batches),
    ]
    for suite, title in FAMILIES.items():
        for direction, what in (("forward", "no gradients"), ("backward", "forward + gradients")):
            found = cases.get((suite, direction), {})
            cells = [_against_best(found.get(b, [])) for b in batches]
            if any(cells):
                lines.append(f"| {title}, {what} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"<sub>{' '.join(conditions_of(chosen).split())}</sub>", ""])


def _against_best(rows: Sequence[TimeRow]) -> str:
    ours = next((r for r in rows if r.provider == "fastwm-fused"), None)
    if ours is None:
        return ""
    ratio = f" ({ours.vs_best_peer:.2f}x)" if ours.vs_best_peer else ""
    return f"{ours.median_ms:.3g}{ratio}"


def rewritten(text: str, new: str, name: str = "bench") -> str:
    """The README with ``new`` between the markers of that name.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"no {begin} ... {end} in the README")
    head, rest = text.split(begin, 1)
    return head + begin + "\n" + new + end + rest.split(end, 1)[1]


def _times(results: Path, suites: Iterable[str]) -> list[TimeRow]:
    paths = [results / f"{suite}.jsonl" for suite in suites]
    return [row for p in paths if p.exists() for row in read(p) if isinstance(row, TimeRow)]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m fastwm.bench.readme")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("bench/results"))
    options = parser.parse_args(argv)
    old = options.readme.read_text()
    new = rewritten(old, block(_times(options.results, ["mlp"])))
    new = rewritten(new, families(_times(options.results, FAMILIES)), "families")
    new = rewritten(new, learned(options.results / "examples"), "examples")
    if options.check:
        if new != old:
            print(f"{options.readme} does not say what {options.results} says", file=sys.stderr)
        return int(new != old)
    options.readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
