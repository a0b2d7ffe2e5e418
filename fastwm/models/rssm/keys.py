"""The keys of recurrent state-space models: torchrl's."""

from __future__ import annotations

__all__ = [
    "ACTION",
    "BELIEF",
    "EMBEDDING",
    "IS_INIT",
    "LATENTS",
    "NEXT_LATENTS",
    "PREVIOUS_ACTION",
    "STATE",
]

#: Stochastic and deterministic latent.
STATE, BELIEF = "state", "belief"
LATENTS = [STATE, BELIEF]
NEXT_LATENTS: list[str | tuple[str, ...]] = [("next", STATE), ("next", BELIEF)]
ACTION, PREVIOUS_ACTION, IS_INIT = "action", "previous_action", "is_init"
EMBEDDING = "encoded_latents"
