"""One process: build, check, time in turns, check again, write rows.

A provider that is not green gets no number: not in a table, not in a row, not in anyone's ratio.
"""

from __future__ import annotations

import gc
import os
import traceback
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastwm.bench import conditions, limits, memory, stats, suites
from fastwm.bench.plan import Plan
from fastwm.bench.problem import Case, Problem
from fastwm.bench.providers import REFERENCE, Built, Provider, Unavailable, chosen
from fastwm.bench.rows import MemoryRow, Row, TimeRow, append, read
from fastwm.bench.timing import interleave
from fastwm.bench.verdict import Verdict, compare

__all__ = ["Outcome", "Session", "bad", "recorded", "run_plan"]

#: Reasons for a provider to be absent. The last two make the run fail.
REFUSED, UNAVAILABLE, RED, FAILED = "refused", "unavailable", "red", "failed"


@dataclass
class Outcome:
    """One configuration: its rows, and who is absent and why (``(status, reason)``)."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, tuple[str, str]] = field(default_factory=dict)


def bad(absent: Mapping[str, Iterable[str]]) -> list[str]:
    """Names of the providers whose absence is a fault, not a circumstance."""
    return [name for name, (status, _) in absent.items() if status in (RED, FAILED)]


@dataclass
class _Entry:
    """One provider that ran: its first result is kept, to see whether later calls write into it."""

    built: Built
    first: Any
    verdict: Verdict | None = None


def _outputs(entry: Built, raw: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in entry.read(raw).items()}


def _weight_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _too_big(case: Case, suite: suites.Suite) -> str | None:
    """Reason why a backward pass would not fit into memory, or None."""
    if not case.backward or case.device != "cpu":
        return None
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
    needed = 8 * suite.activations * case.batch * case.horizon
    if needed < 0.7 * free:
        return None
    wants, has = (f"{n / 2**30:.1f} GiB" for n in (needed, free))
    return f"backward may keep {wants} of activations, {has} are free"


class Session:
    """Runs configurations one after the other in this process.

    Args:
        plan: of one thread count, which is this process's.
        providers: default: those that the plan names. The reference always takes part.
    """

    def __init__(self, plan: Plan, providers: Mapping[str, Provider] | None = None) -> None:
        self.plan = plan
        (self.threads,) = plan.threads
        torch.set_num_threads(self.threads)
        self.suite = suites.suite(plan.suite)
        wanted = chosen(list(plan.providers)) if providers is None else dict(providers)
        self.providers = {REFERENCE: chosen([REFERENCE])[REFERENCE], **wanted}
        self.run_id = uuid.uuid4().hex[:12]
        self.commit, self.dirty = conditions.commit()
        self.code = conditions.code_hash()
        self.versions = conditions.versions()
        self._limits: limits.Limits | None = None

    # ------------------------------------------------------------ parts of a configuration

    def _build(
        self, case: Case, problem: Problem, outcome: Outcome, names: Iterable[str]
    ) -> dict[str, _Entry]:
        """Build and run each once; whoever cannot goes to ``outcome.absent``."""
        entries = {}
        for name in names:
            provider = self.providers[name]
            reason = provider.refuses(case)
            if reason:
                outcome.absent[name] = REFUSED, reason
                continue
            try:
                built = provider.build(problem)
                entries[name] = _Entry(built, built.checked())
            except Unavailable as error:
                outcome.absent[name] = UNAVAILABLE, str(error)
            except Exception as error:  # one broken provider must not hide the others' numbers
                traceback.print_exc()
                outcome.absent[name] = FAILED, f"{type(error).__name__}: {error}".splitlines()[0]
        return entries

    def _judge(
        self,
        problem: Problem,
        entries: dict[str, _Entry],
        expected: dict[str, Tensor],
        outcome: Outcome,
        when: str,
    ) -> None:
        """Drop whoever is red, in the first result as it is now and in a new one.

        The new one is then written over: if the first changes with it, the next look is red.
        """
        start = {key: value.detach().clone() for key, value in problem.start.items()}
        for name, entry in list(entries.items()):
            for what in ("first", "a later"):
                raw = entry.first if what == "first" else entry.built.checked()
                found = _outputs(entry.built, raw)
                verdict = compare(found, expected)
                if entry.verdict is None:
                    entry.verdict = verdict
                if not verdict.ok:
                    outcome.absent[name] = RED, f"{verdict.fault} ({what} call, {when} timing)"
                    del entries[name]
                    break
                if what == "a later":
                    for value in found.values():
                        value.fill_(torch.nan)
                    if not all(torch.equal(problem.start[k], v) for k, v in start.items()):
                        for key, value in start.items():
                            problem.start[key].detach().copy_(value)
                        outcome.absent[name] = RED, "its results share memory with the start"
                        del entries[name]

    def _expected(self, entries: dict[str, _Entry]) -> dict[str, Tensor] | None:
        """The reference's outputs, copied: nobody can write into them."""
        if REFERENCE not in entries:
            return None
        reference = entries[REFERENCE]
        return {k: v.clone() for k, v in _outputs(reference.built, reference.first).items()}

    def _common(self, case: Case, name: str, verdict: Verdict, outcome: Outcome) -> dict[str, Any]:
        return {
            "run": self.run_id,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": self.commit,
            "dirty": self.dirty,
            "code": self.code,
            "command": self.plan.command(),
            "machine": conditions.machine(case.device),
            "versions": self.versions,
            "suite": case.suite,
            "batch": case.batch,
            "horizon": case.horizon,
            "direction": case.direction,
            "threads": case.threads,
            "device": case.device,
            "dtype": case.dtype,
            "provider": name,
            "ours": self.providers[name].ours,
            "parity": {"reference": REFERENCE, "worst": verdict.worst, "used": verdict.used},
            "absent": {n: list(why) for n, why in outcome.absent.items()},
        }

    # ------------------------------------------------------------ configurations

    def time(self, case: Case) -> Outcome:
        """Time one configuration."""
        outcome = Outcome(case)
        reason = _too_big(case, self.suite)
        if reason:
            outcome.absent = dict.fromkeys(self.providers, (REFUSED, reason))
            return outcome
        problem = Problem.of(case, self.suite)
        entries = self._build(case, problem, outcome, self.providers)
        expected = self._expected(entries)
        if expected is None:
            # Without a reference nothing can be green.
            outcome.absent |= dict.fromkeys(entries, (RED, "no reference to compare with"))
            return outcome
        self._judge(problem, entries, expected, outcome, "before")
        if REFERENCE not in entries:
            outcome.absent |= dict.fromkeys(entries, (RED, "the reference does not repeat itself"))
            return outcome
        runs = {name: entry.built.run for name, entry in entries.items()}
        samples = interleave(runs, self.plan.effort, case.device)
        self._judge(problem, entries, expected, outcome, "after")
        outcome.rows = self._time_rows(case, problem, entries, samples, outcome)
        return outcome

    def _time_rows(
        self,
        case: Case,
        problem: Problem,
        entries: Mapping[str, _Entry],
        samples: Mapping[str, Any],
        outcome: Outcome,
    ) -> list[Row]:
        weights = _weight_bytes(problem.model)
        if self._limits is None:
            self._limits = limits.measure(weights, case.device)
        floor = limits.floor(case, self.suite, self._limits, weights)
        gflop = self.suite.flop(case.batch, case.horizon, case.backward) / 1e9
        gflop_done = self.suite.flop_done(case.batch, case.horizon, case.backward) / 1e9
        ms = {name: samples[name].ms for name in entries}
        peer = stats.best_peer(ms, {n for n in ms if self.providers[n].ours})
        rows: list[Row] = []
        for name, entry in entries.items():
            low, middle, high = stats.quartiles(ms[name])
            assert entry.verdict is not None
            rows.append(
                TimeRow(
                    **self._common(case, name, entry.verdict, outcome),
                    rounds=len(ms[name]),
                    calls=samples[name].calls,
                    samples_ms=[round(value, 6) for value in ms[name]],
                    cpu_share=samples[name].cpu_share,
                    median_ms=middle,
                    q1_ms=low,
                    q3_ms=high,
                    vs_reference=stats.median_ratio(ms[REFERENCE], ms[name])
                    if REFERENCE in ms
                    else None,
                    vs_best_peer=stats.median_ratio(ms[peer], ms[name]) if peer else None,
                    best_peer=peer,
                    gflop=gflop,
                    gflops=1e3 * gflop / middle,
                    limits=self._limits.to_dict(),
                    floor_ms=floor.ms,
                    floor_compute_ms=floor.compute_ms,
                    floor_weights_ms=floor.weights_ms,
                    gflop_done=gflop_done,
                )
            )
        return rows

    def _run_of(self, name: str, problem: Problem) -> Callable[[], Any]:
        return self.providers[name].build(problem).run

    def peak_memory(self, case: Case) -> Outcome:
        """Peak memory of one call per provider, one after the other, each alone in memory."""
        outcome = Outcome(case)
        problem = Problem.of(case, self.suite)
        expected: dict[str, Tensor] | None = None
        measured: dict[str, tuple[Verdict, memory.Peak]] = {}
        for name in self.providers:
            entries = self._build(case, problem, outcome, [name])
            if name not in entries:
                continue
            if expected is None:
                expected = self._expected(entries)
                if expected is None:
                    outcome.absent[name] = RED, "no reference to compare with"
                    continue
            self._judge(problem, entries, expected, outcome, "before")
            if name not in entries:
                continue
            verdict = entries.pop(name).verdict
            assert verdict is not None
            peak = memory.peak_of(partial(self._run_of, name, problem), case.device)
            measured[name] = verdict, peak
        outcome.rows = [
            MemoryRow(
                **self._common(case, name, verdict, outcome),
                **asdict(peak),
                step_bytes=4 * self.suite.activations * case.batch,
                vs_reference=peak.peak_bytes / measured[REFERENCE][1].peak_bytes
                if REFERENCE in measured
                else None,
            )
            for name, (verdict, peak) in measured.items()
        ]
        return outcome


def recorded(rows: Iterable[Row], session: Session, case: Case, kind: str) -> list[Row]:
    """Rows of one earlier run that already answer ``case`` for the same code and machine, or none.

    An earlier run answers when each provider asked for either has its row or was absent for a
    circumstance; one that was red or failed is tried again.
    """
    here = conditions.machine(case.device)
    runs: dict[str, list[Row]] = {}
    for row in rows:
        same = (row.suite, row.batch, row.horizon, row.direction, row.threads, row.device)
        wanted = (
            case.suite, case.batch, case.horizon, case.direction, case.threads, case.device,
        )  # fmt: skip
        if (
            row.kind == kind
            and same == wanted
            and row.code == session.code
            and row.machine.get("cpu") == here["cpu"]
            and row.machine.get("gpu") == here.get("gpu")
        ):
            runs.setdefault(row.run, []).append(row)
    for found in reversed(runs.values()):
        answered = {row.provider for row in found}
        answered |= set(found[0].absent) - set(bad(found[0].absent))
        if set(session.providers) <= answered:
            return found
    return []


def run_plan(
    plan: Plan,
    show: Callable[[Outcome, int, int, bool], None],
    providers: Mapping[str, Provider] | None = None,
) -> bool:
    """Run a plan of one thread count in this process; append rows as each configuration is done.

    Args:
        plan: see :class:`Plan`.
        show: called with each outcome, its number, their count, and whether it was known already.
        providers: default: those that the plan names.

    Returns:
        True when nothing was red and nothing failed.
    """
    session = Session(plan, providers)
    path = Path(plan.results)
    kind = "memory" if plan.memory else "time"
    earlier = [] if plan.force else list(read(path))
    cases = list(plan.cases())
    good = True
    for number, case in enumerate(cases, 1):
        known = recorded(earlier, session, case, kind)
        if known:
            absent = {n: (s, why) for n, (s, why) in known[0].absent.items()}
            show(Outcome(case, known, absent), number, len(cases), True)
            continue
        outcome = session.peak_memory(case) if plan.memory else session.time(case)
        append(path, outcome.rows)
        show(outcome, number, len(cases), False)
        good &= not bad(outcome.absent)
        gc.collect()
    return good
