"""What to measure: one plan from the command line, cut into one part per process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastwm.bench.problem import Case
from fastwm.bench.timing import Effort

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Every configuration times every provider, and how long to spend.

    Args:
        results: the file that rows are appended to.
        force: measure again what is already recorded for the same code.
        memory: measure peak memory instead of time.
    """

    suite: str
    batches: tuple[int, ...]
    horizons: tuple[int, ...]
    directions: tuple[str, ...]
    threads: tuple[int, ...]
    providers: tuple[str, ...]
    device: str
    results: str
    effort: Effort = field(default_factory=Effort)
    force: bool = False
    memory: bool = False

    def cases(self) -> Iterator[Case]:
        """Horizons vary fastest: what is compiled once per batch size is then compiled once."""
        for threads in self.threads:
            for direction in self.directions:
                for batch in self.batches:
                    for horizon in self.horizons:
                        yield Case(
                            self.suite, batch, horizon, direction, threads, device=self.device
                        )

    def with_threads(self, threads: int) -> Plan:
        return replace(self, threads=(threads,))

    def command(self) -> str:
        """What to type to measure this again (where the rows go is not part of it)."""

        def listed(values: tuple[Any, ...]) -> str:
            return " ".join(map(str, values))

        words = [
            f"python -m fastwm bench --suite {self.suite} --device {self.device}",
            f"--batch {listed(self.batches)} --horizon {listed(self.horizons)}",
            f"--direction {listed(self.directions)} --threads {listed(self.threads)}",
            f"--providers {listed(self.providers)} --seconds {self.effort.seconds:g}",
            f"--rounds {self.effort.min_rounds} {self.effort.max_rounds}",
        ]
        if self.memory:
            words.append("--memory")
        return " ".join([*words, "--force"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        raw = json.loads(text)
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(**{**lists, "effort": Effort(**raw["effort"])})
