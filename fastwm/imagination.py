"""`imagine`: an imagined rollout with all that an actor-critic loss takes from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type, step_mdp
from torchrl.modules.distributions.utils import has_analytic_entropy, rsample_and_log_prob

from fastwm.acceleration import never_resets
from fastwm.fast_env import FastEnv
from fastwm.ops import lambda_return

__all__ = ["imagine"]

GRADIENTS = ("dynamics", "reinforce")
# torchrl's names for the probability of going on, and for its logit.
_PROBABILITY, _LOGIT = "continuation", "continue_pred"


def imagine(
    env: EnvBase,
    policy: TensorDictModuleBase,
    start: TensorDictBase,
    horizon: int,
    *,
    value: TensorDictModuleBase | None = None,
    continuation: TensorDictModuleBase | None = None,
    gamma: float = 0.99,
    lmbda: float = 0.95,
    gradient: str = "dynamics",
    stop_policy_inputs: bool = False,
    policy_terms: bool = True,
    value_key: NestedKey = "state_value",
    reward_key: NestedKey = "reward",
    action_key: NestedKey = "action",
) -> TensorDictBase:
    r"""Roll the policy out in imagination, and value what it sees.

    With :math:`s_0` the start, :math:`r_{t+1}, s_{t+1}` what follows from step t (what torchrl keeps under
    ``"next"``), :math:`v` the value and :math:`c` the probability of going on, at :math:`t < H`:

    .. math::
        R_t = r_{t+1} + \gamma c_{t+1} ((1 - \lambda) v(s_{t+1}) + \lambda R_{t+1}), \quad
        R_H = v(s_H), \quad w_t = c_0 \prod_{k=1}^{t} \gamma c_k

    The rollout has a fixed horizon. Actions are sampled; the start is cut from whatever graph it hangs on;
    the parameters of the env, the value and the continuation get no gradient (unless the policy holds them).
    It runs on the engine of the env: see :class:`fastwm.WorldModelEnv` and :func:`fastwm.accelerate`.

    Args:
        env: imagines.
        policy: a TensorDict module that writes the action. With a ``get_dist``, as torchrl's
            probabilistic modules have it, its log-probabilities and entropies are there too.
        start: the latents to start from, any batch ``[*B]`` that the env takes. A float ``"continuation"``
            ``[*B, 1]`` in it is :math:`c_0`, for starts that may be ends of episodes; 1 without it.
        horizon: steps H.

    Keyword Args:
        value: writes ``value_key`` ``[*B, 1]`` from what it reads of a state. Without it there are no
            returns.
        continuation: writes the probability ``"continuation"`` or the logit ``"continue_pred"``
            ``[*B, 1]``, under ``"next"`` or not, from the latents: torchrl's names. Default:
            :math:`c = 1` but where the env says ``("next", "terminated")``. A head that was trained to
            predict :math:`\gamma c` (as in Dreamer's and DreamerV2's code) takes ``gamma=1``.
        gamma, lmbda: :math:`\gamma` and :math:`\lambda`, between 0 and 1. 0.99 and 0.95 (Dreamer's;
            DreamerV3 takes 0.997).
        gradient: ``"dynamics"``: through latents, rewards and values into the actions (Dreamer,
            DreamerV2 with continuous actions). ``"reinforce"``: everything is detached but
            ``action_log_prob`` and ``entropy`` (DreamerV2 with discrete actions, DreamerV3).
        stop_policy_inputs: detach what the policy reads in the course of the rollout, so that an action's
            gradient is not passed on to the state it was chosen in. So in Dreamer's code; its paper
            and torchrl's losses pass it on.
        policy_terms: evaluate ``action_log_prob`` and ``entropy``, at the detached states and actions.
            Costs one more pass of the policy.
        value_key, reward_key, action_key: names of these entries.

    Returns:
        The env's rollout, batch ``[*B, H]``, dim name ``"time"``, with, all ``[*B, H, 1]``:

        - ``("next", "continuation")``, ``"continuation"``: :math:`c_{t+1}` and :math:`c_t`;
        - ``"discount_weight"``: :math:`w_t`, detached;
        - ``value_key``, ``("next", value_key)``: :math:`v(s_t)`, detached, and :math:`v(s_{t+1})`;
        - ``"lambda_target"``: :math:`R_t`, the name in torchrl's Dreamer losses;
        - ``"advantage"``: :math:`R_t - v(s_t)`, detached;
        - ``"action_log_prob"``, ``"entropy"``: of the policy, differentiable in its parameters alone;
          the entropy by one sample where the distribution has no closed form (a ``TanhNormal``).

        Rows that are finished go on, with weight 0 once terminated. Where an env restarts them, they
        begin anew with weight 1, and no return reaches over.

    Raises:
        ValueError: a ``gradient`` of another name; ``gamma`` or ``lmbda`` outside [0, 1]; a
            ``continuation`` that writes neither key.
        KeyError: the value, or the rollout's reward, is not there.
        RuntimeError: a reward, value or continuation of another shape than ``[*B, H, 1]``; whatever
            the rollout raises.

    Example:
        >>> import torch, fastwm
        >>> from torchrl.envs import GymEnv
        >>> from fastwm.models import dreamer_v1
        >>> base_env = GymEnv("Pendulum-v1")
        >>> family = dreamer_v1(base_env, deter_size=16, stoch_size=4, num_units=16, embedding=16)
        >>> start = family.world_model.encode(base_env.rollout(8).select("observation"))
        >>> env = family.env(base_env, batch_size=[])
        >>> dream = fastwm.imagine(env, family.policy, start, 15, value=family.value)
        >>> dream["lambda_target"].shape
        torch.Size([8, 15, 1])
        >>> actor_loss = -(dream["discount_weight"] * dream["lambda_target"]).mean()
        >>> actor_loss.backward()
        >>> states = dream.select("state", "belief").detach()
        >>> error = family.value(states)["state_value"] - dream["lambda_target"].detach()
        >>> value_loss = (dream["discount_weight"] * error.square()).mean() / 2

    Source: Hafner et al. 2020, arXiv:1912.01603, equations 4 to 8; Hafner et al. 2021, arXiv:2010.02193,
    equations 4 to 6; Hafner et al. 2023, arXiv:2301.04104, equations 5 to 7. Their times differ; so do
    those of their code, which lets the reward of a state count at that state. Here they are as in torchrl's
    ``DreamerActorLoss`` and ``DreamerV3ActorLoss``. (The first of torchrl 0.14.1 takes its returns along
    the wrong dimension, so that lambda has no effect and they are :math:`r_{t+1} + \gamma v(s_{t+1})`,
    unless its estimator is made with ``make_value_estimator(time_dim=-2, ...)``.)
    """
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r}; choose one of {', '.join(GRADIENTS)}.")
    for name, number in (("gamma", gamma), ("lmbda", lmbda)):
        if not 0.0 <= number <= 1.0:
            raise ValueError(f"{name}={number} is not between 0 and 1.")
    heads = [m for m in (value, continuation) if m is not None]
    graph: Any = torch.no_grad() if gradient == "reinforce" else nullcontext()
    with graph, _frozen([env, *heads], policy):
        with set_exploration_type(ExplorationType.RANDOM):
            dream = env.rollout(
                horizon,
                _stopped(policy) if stop_policy_inputs else policy,
                tensordict=start.detach(),
                break_when_any_done=False,
            )
        _check(dream, ("next", reward_key), "the env's reward")
        following = step_mdp(dream, keep_other=True)
        done, terminated = _flags(dream)
        restarted = done if _restarts(env) else torch.zeros_like(done)
        going_on = (~terminated).to(dream["next", reward_key].dtype)
        if continuation is not None:
            going_on = _probability(continuation, following)
        first = dream.get("continuation", None)
        first = torch.ones_like(going_on[..., :1, :]) if first is None else first[..., :1, :]
        dream.set("continuation", torch.cat((first.to(going_on), going_on[..., :-1, :]), -2))
        dream.set(("next", "continuation"), going_on)
        dream.set("discount_weight", _weights(first.to(going_on), gamma * going_on, restarted))
        if value is not None:
            here, after = _values(value, dream, following, value_key)
            discount: float | Tensor = gamma
            if continuation is not None:
                discount, done = gamma * going_on, restarted
                terminated = torch.zeros_like(done)
            target = lambda_return(
                discount, lmbda, after, dream["next", reward_key], done, terminated
            )
            dream.set(value_key, here.detach())
            dream.set(("next", value_key), after)
            dream.set("lambda_target", target)
            dream.set("advantage", (target - here).detach())
    if policy_terms and hasattr(policy, "get_dist"):
        _add_policy_terms(dream, policy, action_key)
    return dream


@contextmanager
def _frozen(modules: Iterable[Any], live: Any) -> Iterator[None]:
    """No gradients to the parameters of the modules, but to those that ``live`` holds as well."""
    kept = {id(p) for p in live.parameters()} if isinstance(live, torch.nn.Module) else set()
    found = [
        p
        for module in modules
        if isinstance(module, torch.nn.Module)
        for p in module.parameters()
        if p.requires_grad and id(p) not in kept
    ]
    for parameter in found:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_(True)


class _Stopped(TensorDictModuleBase):
    """A policy that reads detached entries."""

    def __init__(self, policy: TensorDictModuleBase) -> None:
        super().__init__()
        self.policy = policy
        self.in_keys, self.out_keys = policy.in_keys, policy.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        out = self.policy(tensordict.select(*self.in_keys, strict=False).detach())
        return tensordict.update(out.select(*self.out_keys, strict=False))


# One per policy, kept by the plans that run it: another object would be another policy to an env.
_kept_stopped: WeakValueDictionary[int, _Stopped] = WeakValueDictionary()


def _stopped(policy: TensorDictModuleBase) -> _Stopped:
    found = _kept_stopped.get(id(policy))
    if found is None or found.policy is not policy:
        found = _kept_stopped[id(policy)] = _Stopped(policy)
    return found


def _restarts(env: EnvBase) -> bool:
    return bool(env.restart) if isinstance(env, FastEnv) else not never_resets(type(env))


def _flags(dream: TensorDictBase) -> tuple[Tensor, Tensor]:
    """The root's ``done`` and ``terminated``, ``[*B, H, 1]``; False where there is none.

    A model that writes "terminated" alone leaves "done" as it was before, in a ``DreamerEnv``.
    """
    done = dream.get(("next", "done"), None)
    if done is None:
        done = torch.zeros((*dream.batch_size, 1), dtype=torch.bool, device=dream.device)
    terminated = dream.get(("next", "terminated"), None)
    return (done, done) if terminated is None else (done | terminated, terminated)


def _weights(first: Tensor, discount: Tensor, restarted: Tensor) -> Tensor:
    """``w_t``: the product of what came before, from 1 where a row was restarted."""
    weight, weights = first[..., 0, :], []
    for step, again in zip(discount.unbind(-2), restarted.unbind(-2), strict=True):
        weights.append(weight)
        weight = torch.where(again, torch.ones_like(weight), weight * step)
    return torch.stack(weights, -2).detach()


def _probability(module: TensorDictModuleBase, following: TensorDictBase) -> Tensor:
    """The probability of going on at the next states, as ``module`` says."""
    states = following.copy().set("next", following.copy())
    written = [unravel_key(key) for key in module.out_keys]
    for name in (_PROBABILITY, _LOGIT):
        for key in (name, ("next", name)):
            if key in written:
                out = _check(module(states), key, "the continuation")
                return out.sigmoid() if name == _LOGIT else out
    raise ValueError(
        f"The continuation writes {written}: neither the probability {_PROBABILITY!r} nor its logit "
        f"{_LOGIT!r}."
    )


def _values(
    value: TensorDictModuleBase, dream: TensorDictBase, following: TensorDictBase, key: NestedKey
) -> tuple[Tensor, Tensor]:
    """Values of the states before and after each step: all of them are evaluated once."""
    *batch, horizon = dream.batch_size
    states = TensorDict({}, batch_size=[*batch, horizon + 1], device=dream.device)
    first = (*[slice(None)] * len(batch), slice(1))
    for read in value.in_keys:
        here, after = dream.get(read, None), following.get(read, None)
        if here is not None and after is not None:
            states.set(read, torch.cat((here[first], after), len(batch)))
    found = _check(value(states), key, "the value")
    return found[..., :-1, :], found[..., 1:, :]


def _add_policy_terms(dream: TensorDictBase, policy: Any, action_key: NestedKey) -> None:
    states = dream.select(*policy.in_keys, strict=False).detach()
    distribution = policy.get_dist(states)
    log_prob = distribution.log_prob(dream.get(action_key).detach())
    if has_analytic_entropy(distribution):
        entropy = distribution.entropy()
    else:
        entropy = -rsample_and_log_prob(distribution)[1]
    shape = (*dream.batch_size, 1)
    dream.set("action_log_prob", log_prob.reshape(shape))
    dream.set("entropy", entropy.reshape(shape))


def _check(tensordict: TensorDictBase, key: NestedKey, what: str) -> Tensor:
    found = tensordict.get(key, None)
    if found is None:
        raise KeyError(
            f"{what} is not under {key!r}: there is {sorted(tensordict.keys(True, True), key=str)}"
        )
    wanted = (*tensordict.batch_size, 1)
    if found.shape != wanted:
        raise RuntimeError(
            f"{what} {key!r} has shape {tuple(found.shape)}, it needs {tuple(wanted)}."
        )
    return found
