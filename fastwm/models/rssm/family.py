"""`RSSMFamily`: what PlaNet and the Dreamers have in common around a prior and a posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, TensorDictPrimer, TransformedEnv

from fastwm.models.family import Family
from fastwm.models.rssm.filter import Act, FirstLatents, RSSMFilter
from fastwm.models.rssm.keys import (
    ACTION,
    BELIEF,
    EMBEDDING,
    LATENTS,
    NEXT_LATENTS,
    PREVIOUS_ACTION,
    STATE,
)
from fastwm.models.rssm.observation import ObservationModel
from fastwm.models.rssm.posterior import RSSMRollout
from fastwm.models.rssm.prior import Prior, PriorV3
from fastwm.world_model import WorldModel

__all__ = ["RSSMFamily"]


class RSSMFamily(Family):
    """A recurrent state-space model with its heads, policy and value.

    The same prior is the step of imagination, a part of the posterior rollout that training runs
    (:class:`~fastwm.models.RSSMRollout`) and of the filter that acts in a real env, and the same heads
    serve all of them.

    Args:
        name, settings: see :class:`~fastwm.models.Family`.
        prior: ``(state, belief, action) -> (*statistics, state, belief)``.
        posterior: ``(belief, embedding) -> (*statistics, state)``.
        observation: encoder and decoder.
        reward: ``(("next", "state"), ("next", "belief")) -> ("next", "reward")``.

    Keyword Args:
        sizes: widths of ``state`` and ``belief``.
        action_spec: of the base env.
        statistics: names of what prior and posterior say of the state, e.g. ``("mean", "std")``:
            ``("next", "prior_mean")``, ....
        observation_key: of the base env.
        continuation: ``(("next", "state"), ("next", "belief")) -> (("next", "continue_pred"),
            ("next", "terminated"))``: logit of going on, and the flag.
        policy, value: on ``state`` and ``belief``.

    Attributes:
        world_model: encodes the first observation of an episode, and imagines from there. Its step
            does not decode; ``world_model.decode(rollout)`` writes ``reco_<observation>``.
        observe: a batch ``[B, T]`` to its posteriors, priors and the heads' predictions, under
            ``"next"``, in the form that torchrl's ``DreamerModelLoss`` takes.
        rollout: the :class:`~fastwm.models.RSSMRollout` in it.
        filter: the :class:`RSSMFilter` of :meth:`actor`.
        continuation: as given.
    """

    observe: TensorDictSequential
    rollout: RSSMRollout
    filter: RSSMFilter
    continuation: TensorDictModuleBase | None

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        prior: Prior | PriorV3,
        posterior: nn.Module,
        observation: ObservationModel,
        reward: TensorDictModuleBase,
        *,
        sizes: tuple[int, int],
        action_spec: TensorSpec,
        statistics: Sequence[str],
        observation_key: str,
        continuation: TensorDictModuleBase | None = None,
        policy: TensorDictModuleBase | None = None,
        value: TensorDictModuleBase | None = None,
    ) -> None:
        of = {w: [("next", f"{w}_{s}") for s in statistics] for w in ("prior", "posterior")}
        dynamics = TensorDictModule(prior, [*LATENTS, ACTION], [*of["prior"], *NEXT_LATENTS])
        rollout = RSSMRollout(
            dynamics,
            TensorDictModule(
                posterior,
                [("next", BELIEF), ("next", EMBEDDING)],
                [*of["posterior"], ("next", STATE)],
            ),
        )
        first = FirstLatents(prior, posterior, (*sizes, action_spec.shape[-1]))
        encoder = TensorDictSequential(
            TensorDictModule(observation.encoder, [observation_key], [EMBEDDING]),
            TensorDictModule(first, [EMBEDDING], LATENTS),
        )
        reconstruction = f"reco_{observation_key}"
        world_model = _WorldModel(
            encoder,
            dynamics,
            reward,
            done_head=continuation,
            decoder=TensorDictModule(observation.decoder, LATENTS, [reconstruction]),
        )
        heads = [reward] if continuation is None else [reward, continuation]
        observe = TensorDictSequential(
            TensorDictSequential(
                _FromZero(sizes),
                TensorDictModule(
                    observation.encoder, [("next", observation_key)], [("next", EMBEDDING)]
                ),
                rollout,
                TensorDictModule(observation.decoder, NEXT_LATENTS, [("next", reconstruction)]),
            ),
            *heads,
        )
        super().__init__(
            name, settings, world_model, latent_key=STATE, policy=policy, value=value,
            observe=observe, rollout=rollout, filter=RSSMFilter(prior, posterior),
            continuation=continuation,
        )  # fmt: skip
        self.sizes = sizes
        self.action_spec = action_spec
        self.observation_key = observation_key

    def real_env(self, env: EnvBase) -> TransformedEnv:
        """A real env that keeps what :meth:`actor` remembers between steps.

        Adds ``is_init`` and, zero at first, ``state``, ``belief`` and ``previous_action``.
        """
        state, belief = self.sizes
        action = env.full_action_spec_unbatched[ACTION]
        primer = TensorDictPrimer(
            {
                STATE: Unbounded(state),
                BELIEF: Unbounded(belief),
                PREVIOUS_ACTION: Unbounded(action.shape, dtype=action.dtype),
            },
            default_value=0,
            expand_specs=True,
        )
        return TransformedEnv(env, Compose(InitTracker(), primer), auto_unwrap=True)

    def actor(
        self,
        policy: TensorDictModuleBase | Callable[[TensorDictBase], TensorDictBase] | None = None,
    ) -> TensorDictSequential:
        """A policy for :meth:`real_env`: filters what is observed, then acts on the latents.

        Args:
            policy: acts on ``state`` and ``belief``: the family's own by default; or a planner; or
                the family's with exploration noise after it.

        Raises:
            ValueError: no policy is given, and the family has none.
        """
        policy = self.policy if policy is None else policy
        if policy is None:
            raise ValueError(f"{self.name} has no policy of its own: give one, e.g. a planner.")
        encode = self.world_model.encoder[0]
        return TensorDictSequential(encode, self.filter, policy, Act(self.action_spec))


class _FromZero(TensorDictModuleBase):
    """Latents to begin a sequence with, where the batch ``[*B, T]`` brings none."""

    def __init__(self, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.widths = dict(zip(LATENTS, sizes, strict=True))
        self.in_keys = [ACTION]
        self.out_keys = LATENTS

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get(ACTION)
        dtype = action.dtype if action.dtype.is_floating_point else torch.get_default_dtype()
        for key, width in self.widths.items():
            if tensordict.get(key, None) is None:
                zero = torch.zeros((), dtype=dtype, device=action.device)
                tensordict.set(key, zero.expand(*tensordict.batch_size, width))
        return tensordict


class _WorldModel(WorldModel):
    """A world model whose step does not decode: imagination happens in the latents alone."""

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        dynamics: TensorDictModuleBase,
        reward_head: TensorDictModuleBase,
        *,
        done_head: TensorDictModuleBase | None,
        decoder: TensorDictModuleBase,
    ) -> None:
        super().__init__(encoder, dynamics, reward_head, done_head=done_head)
        self.decoder = decoder
