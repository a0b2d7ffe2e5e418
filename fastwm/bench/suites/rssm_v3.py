"""``rssm_v3``: a categorical recurrent state-space model in the manner of DreamerV3.

The state is 32 one-hot vectors of 32 classes, drawn with straight-through gradients. A product with
it is a sum of 32 rows, so the floor counts 32 multiply-adds where the peers do 1024; towards the
state the backward pass needs them all.

A draw is ``argmax(p / e)`` with ``e`` exponential. Where the two largest of these are nearly equal,
rounding decides, and two right implementations go different ways. So rows that meet a near tie are
given another start, until none is left; noise depends on the seed alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastwm.bench.suites.base import Model, Suite, activations_of, linear_macs
from fastwm.bench.suites.layers import (
    BINS,
    jax_gru,
    jax_mlp,
    jax_norm,
    jax_softplus_actor,
    jax_two_hot,
    softplus_scale,
)
from fastwm.bench.suites.noise import reseed
from fastwm.bench.suites.rssm import BeliefAndState
from fastwm.models.layers import Concat, GaussianHead, TwoHot, mlp

__all__ = ["RSSMv3WorldModel", "suite"]

BELIEF, GROUPS, CLASSES, HIDDEN, ACTION = 512, 32, 32, 512, 6
STATE = GROUPS * CLASSES
UNIMIX = 0.01
#: Ratios closer than this are a near tie: some hundred roundings.
TIE = 5e-5


class _Prior(nn.Module):
    """One step without an observation."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(STATE + ACTION, HIDDEN), nn.LayerNorm(HIDDEN), nn.SiLU()
        )
        self.rnn = nn.GRUCell(HIDDEN, BELIEF)
        self.to_state = mlp((BELIEF, HIDDEN, STATE), nn.SiLU, norm=nn.LayerNorm)

    def advance(self, belief: Tensor, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Next belief, and the probabilities of the next state, ``[B, 32, 32]``."""
        belief = self.rnn(self.project(torch.cat((state, action), -1)), belief)
        probs = self.to_state(belief).unflatten(-1, (GROUPS, CLASSES)).softmax(-1)
        return belief, (1 - UNIMIX) * probs + UNIMIX / CLASSES

    def forward(self, belief: Tensor, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        belief, probs = self.advance(belief, state, action)
        index = torch.multinomial(probs.flatten(0, 1), 1).view(-1, GROUPS)
        drawn = functional.one_hot(index, CLASSES).to(probs.dtype)
        return belief, (drawn + (probs - probs.detach())).flatten(-2)


class RSSMv3WorldModel(BeliefAndState):
    """Prior, actor and two-hot reward head, all with 512 SiLU units behind LayerNorms."""

    dynamics: _Prior

    def __init__(self) -> None:
        super().__init__()
        wide = (BELIEF + STATE, HIDDEN, HIDDEN)
        net = mlp((*wide, 2 * ACTION), nn.SiLU, norm=nn.LayerNorm, last=0.1)
        self.policy = GaussianHead(net, softplus_scale)
        self.dynamics = _Prior()
        self.reward = Concat(mlp((*wide, BINS), nn.SiLU, norm=nn.LayerNorm, last=0.1), TwoHot())


def _draws(batch: int) -> tuple[Tensor, ...]:
    # What multinomial draws, and in the shape in which it does.
    action = torch.randn(batch, ACTION)
    return action, torch.empty(batch * GROUPS, CLASSES).exponential_().view(batch, GROUPS, CLASSES)


def _jax_draws(key: Any, batch: int) -> tuple[Any, ...]:
    import jax

    one, two = jax.random.split(key)
    return (
        jax.random.normal(one, (batch, ACTION)),
        jax.random.exponential(two, (batch, GROUPS, CLASSES)),
    )


def _jax_step(
    weights: Mapping[str, Any], carry: tuple[Any, ...], noise: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`RSSMv3WorldModel.step` in JAX."""
    import jax
    import jax.numpy as jnp

    (belief, state), (of_action, of_state) = carry, noise

    def net(name: str, x: Any, layers: int = 3) -> Any:
        return jax_mlp(weights, name, x, layers, jax.nn.silu, norm=True)

    both = jnp.concatenate((belief, state), -1)
    action = jax_softplus_actor(net("policy.net", both), of_action)
    x = jnp.concatenate((state, action), -1)
    x = x @ weights["dynamics.project.0.weight"] + weights["dynamics.project.0.bias"]
    x = jax.nn.silu(jax_norm(weights, "dynamics.project.1", x))
    belief = jax_gru(weights, "dynamics.rnn", x, belief)
    logits = net("dynamics.to_state", belief, 2).reshape(-1, GROUPS, CLASSES)
    probs = (1 - UNIMIX) * jax.nn.softmax(logits, -1) + UNIMIX / CLASSES
    drawn = jax.nn.one_hot(jnp.argmax(probs / of_state, -1), CLASSES, dtype=probs.dtype)
    state = (drawn + (probs - jax.lax.stop_gradient(probs))).reshape(-1, STATE)
    reward = jax_two_hot(net("reward.net", jnp.concatenate((belief, state), -1)))
    return action, belief, state, reward


def _margins(model: RSSMv3WorldModel, carry: tuple[Tensor, Tensor], horizon: int) -> Tensor:
    """Per row, how close its closest draw came to a tie, with the noise of every run."""
    belief, state = carry
    closest = torch.ones(len(belief))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        reseed()
        for _ in range(horizon):
            of_action, of_state = _draws(len(belief))
            loc, scale = model.policy(belief, state)
            action = torch.tanh(loc + scale * of_action)
            belief, probs = model.dynamics.advance(belief, state, action)
            ratio = probs / of_state
            first, second = ratio.topk(2, -1).values.unbind(-1)
            closest = torch.minimum(closest, (1 - second / first).amin(-1))
            state = functional.one_hot(ratio.argmax(-1), CLASSES).to(probs.dtype).flatten(-2)
    return closest


def _start(model: Model, batch: int, horizon: int, generator: torch.Generator) -> dict[str, Tensor]:
    assert isinstance(model, RSSMv3WorldModel)
    belief, state = torch.empty(batch, BELIEF), torch.empty(batch, STATE)
    close = torch.ones(batch, dtype=torch.bool)
    on_cpu = model if next(model.parameters()).device.type == "cpu" else suite().model()
    assert isinstance(on_cpu, RSSMv3WorldModel)
    while close.any():
        index = torch.randint(CLASSES, (batch, GROUPS), generator=generator)
        belief[close] = torch.tanh(torch.randn((batch, BELIEF), generator=generator))[close]
        state[close] = functional.one_hot(index, CLASSES).float().flatten(-2)[close]
        close = _margins(on_cpu, (belief, state), horizon) < TIE
    return {"belief": belief, "state": state}


def suite() -> Suite:
    carry, model = {"belief": BELIEF, "state": STATE}, RSSMv3WorldModel()
    dense = linear_macs(model)
    # Three layers read the state: its 32 ones pick 32 of 1024 rows of their weights.
    saved = 3 * HIDDEN * (STATE - GROUPS)
    weights = sum(p.numel() for p in model.parameters())
    return Suite(
        name="rssm_v3",
        make=RSSMv3WorldModel,
        jax_step=_jax_step,
        carry=carry,
        action=ACTION,
        macs=dense - saved,
        macs_done=dense,
        macs_to_inputs=dense,
        activations=activations_of(model, carry),
        start=_start,
        draws=_draws,
        jax_draws=_jax_draws,
        weights_read=lambda batch: weights - 3 * HIDDEN * STATE * (1 - 1 / CLASSES) ** batch,
    )
