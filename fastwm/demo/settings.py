"""Every number of the demo."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["QUICK", "Settings"]


@dataclass(frozen=True)
class Settings:
    """What is collected, trained, planned and timed.

    Args:
        episodes: real episodes played side by side, one planning call for all of them per step.
        steps: steps per episode; Pendulum-v1 ends after 200.
        random_rounds: rounds of ``episodes`` random episodes before the first training.
        planned_rounds: rounds of planning, each followed by more training on what it met.
        updates: gradient steps per training.
        batch, width, learning_rate: of the training, and of the networks' two hidden layers.
        open_loop: how many steps ahead the prediction error is measured.
        horizon, candidates, refinements, elites: CEM plans ``horizon`` steps; it draws ``candidates``
            action sequences per episode, ``refinements`` times, each around the best ``elites`` before.
        rollout: steps of the imagined rollouts that are timed.
        batches: their batch sizes.
        seconds: aim per timed row, all providers together, within ``rounds`` (least, most) rounds.
    """

    episodes: int = 10
    steps: int = 200
    random_rounds: int = 2
    planned_rounds: int = 1
    updates: int = 1500
    batch: int = 256
    width: int = 64
    learning_rate: float = 2e-3
    open_loop: int = 15
    horizon: int = 15
    candidates: int = 64
    refinements: int = 4
    elites: int = 8
    rollout: int = 15
    batches: tuple[int, ...] = (1, 16, 256, 4096)
    seconds: float = 4.0
    rounds: tuple[int, int] = (10, 40)


#: Every step of the demo in a few seconds. Its numbers mean nothing.
QUICK = Settings(
    episodes=2,
    steps=20,
    random_rounds=1,
    updates=20,
    batch=32,
    width=16,
    open_loop=5,
    horizon=3,
    candidates=8,
    refinements=2,
    elites=2,
    rollout=5,
    batches=(1, 16),
    seconds=0.1,
    rounds=(2, 2),
)
