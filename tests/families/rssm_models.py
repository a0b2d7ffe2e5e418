"""torchrl's recurrent state-space models in small, wired as its recipes do, and batches for them."""

from __future__ import annotations

import torch
import torchrl.modules as torchrl_modules
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules import RSSMPosterior, RSSMPosteriorV3, RSSMPrior, RSSMPriorV3

__all__ = ["ACTION", "BELIEF", "EMBEDDING", "KINDS", "batch_of", "pair", "reference"]

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
