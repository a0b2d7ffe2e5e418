"""torchrl's recurrent state-space models in small, wired as its recipes do; batches and envs for them."""

from __future__ import annotations

from typing import Any

import torch
import torchrl.modules as torchrl_modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase
from torchrl.modules import RSSMPosterior, RSSMPosteriorV3, RSSMPrior, RSSMPriorV3

from fastwm.models import RSSMFamily, insert_resets

__all__ = [
    "ACTION",
    "BELIEF",
    "EMBEDDING",
    "KINDS",
    "Images",
    "batch_of",
    "pair",
    "reference",
    "rows_of",
    "start_of",
]

BELIEF, EMBEDDING, ACTION = 16, 10, 2
GROUPS, CLASSES = 3, 4
KINDS = ("gaussian", "gru", "block_gru")
NEXT_LATENTS = [("next", "state"), ("next", "belief")]


def pair(kind: str, unimix: float = 0.01) -> tuple[TensorDictModule, TensorDictModule]:
    """Prior and posterior."""
    if kind == "gaussian":
        prior = RSSMPrior(torch.empty(ACTION), BELIEF, BELIEF, 5, action_dim=ACTION)
        posterior = RSSMPosterior(BELIEF, 5, rnn_hidden_dim=BELIEF, obs_embed_dim=EMBEDDING)
        said = ("mean", "std")
    else:
        prior = RSSMPriorV3(
            action_shape=(ACTION,), hidden_dim=8, rnn_hidden_dim=BELIEF, num_categoricals=GROUPS,
            num_classes=CLASSES, action_dim=ACTION, unimix=unimix, recurrent_model=kind, num_blocks=4,
        )  # fmt: skip
        posterior = RSSMPosteriorV3(
            8, GROUPS, CLASSES, rnn_hidden_dim=BELIEF, obs_embed_dim=EMBEDDING, unimix=unimix,
            use_rms_norm=kind == "block_gru",
        )  # fmt: skip
        said = ("logits",)
    return (
        TensorDictModule(
            prior,
            ["state", "belief", "action"],
            [*(("next", f"prior_{s}") for s in said), *NEXT_LATENTS],
        ),
        TensorDictModule(
            posterior,
            [("next", "belief"), ("next", "encoded_latents")],
            [*(("next", f"posterior_{s}") for s in said), ("next", "state")],
        ),
    )


def reference(kind: str, prior: TensorDictModule, posterior: TensorDictModule) -> torch.nn.Module:
    """torchrl's own rollout of them."""
    name = "RSSMRollout" if kind == "gaussian" else "RSSMRolloutV3"
    return getattr(torchrl_modules, name)(prior, posterior)


def batch_of(kind: str, *shape: int, resets: bool = True) -> TensorDict:
    """Sequences ``[*B, T]`` whose embeddings want gradients, as do the latents to begin with."""
    state = 5 if kind == "gaussian" else GROUPS * CLASSES
    batch = TensorDict(
        {
            "state": torch.randn(*shape, state).requires_grad_(),
            "belief": torch.randn(*shape, BELIEF).requires_grad_(),
            "action": torch.randn(*shape, ACTION),
            "next": {"encoded_latents": torch.randn(*shape, EMBEDDING).requires_grad_()},
        },
        shape,
    )
    if resets:
        batch["is_init"] = torch.rand(*shape, 1) < 0.3
    return batch


class Images(EnvBase):
    """Emits noise of 64 x 64 pixels; done after five steps."""

    def __init__(self, shape: tuple[int, ...] = (3, 64, 64), dtype: torch.dtype = torch.float32):
        super().__init__()
        self.observation_spec = Composite(pixels=Unbounded(shape, dtype=dtype))
        self.action_spec = Bounded(-1, 1, (2,))
        self.reward_spec = Unbounded(1)

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> TensorDict:
        self.count = 0
        return TensorDict({"pixels": torch.rand(3, 64, 64)})

    def _step(self, tensordict: Any) -> TensorDict:
        self.count += 1
        done = torch.tensor([self.count >= 5])
        return TensorDict(
            {
                "pixels": torch.rand(3, 64, 64),
                "reward": torch.ones(1),
                "done": done,
                "terminated": done,
            }
        )

    def _set_seed(self, seed: int | None) -> None: ...


def start_of(family: RSSMFamily, *batch: int) -> TensorDict:
    widths = dict(zip(("state", "belief"), family.sizes, strict=False))
    values = {key: torch.randn(*batch, n).requires_grad_() for key, n in widths.items()}
    return TensorDict(values, batch)


def rows_of(family: RSSMFamily, base_env: EnvBase, steps: int = 9) -> TensorDict:
    actor = family.actor(family.policy or family.env(base_env).rand_action)
    key = family.observation_key
    data = family.real_env(base_env).rollout(steps, actor, break_when_any_done=False)
    return insert_resets(data, observation_keys=[key])
