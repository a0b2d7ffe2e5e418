"""`TDMPC2Loss`: what TD-MPC2's world model, Q functions and policy prior are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor, nn
from torch.nn import functional
from torchrl.objectives.common import LossModule

from fastwm.backends import check_name
from fastwm.env import WorldModelEnv
from fastwm.models.layers import TwoHot
from fastwm.models.tdmpc2.scale import RunningScale
from fastwm.models.tdmpc2.training_env import HeadsStep, training_env
from fastwm.ops import two_hot_cross_entropy
from fastwm.world_model import WorldModel

__all__ = ["TDMPC2Loss"]


class TDMPC2Loss(LossModule):
    r"""The losses of TD-MPC2 on short sequences of real transitions.

    With :math:`z_0` the first observation's latent, :math:`z_{t+1} = d(z_t, a_t)` rolled out with
    gradients, :math:`\bar z_t` what the encoder makes of the observation that really came, and all
    means over the batch:

    .. math::

        L_{consistency} &= \frac{20}{H} \sum_t \rho^t \, (z_{t+1} - \bar z_{t+1})^2 \\
        L_{reward} &= \frac{0.1}{H} \sum_t \rho^t \, CE(R(z_t, a_t), r_t) \\
        L_{value} &= \frac{0.1}{H} \sum_t \rho^t \, \frac{1}{N} \sum_i CE(Q_i(z_t, a_t), q_t) \\
        q_t &= r_t + \gamma (1 - terminated_t) \min_{i \in pair} \bar Q_i(\bar z_{t+1}, \pi(\bar z_{t+1})) \\
        L_{policy} &= -\frac{1}{H + 1} \sum_{t=0}^{H} \rho^t
            \left[ \mathrm{mean}_{i \in pair} Q_i(z_t, \pi(z_t)) / S + \alpha \mathcal{H}(z_t) \right]

    CE is the cross-entropy to a two-hot target over bins in symlog units, pairs of Q functions are drawn
    anew each time, :math:`\bar Q` are target parameters, S is a :class:`RunningScale` and
    :math:`\alpha \mathcal{H}` the entropy bonus. The policy's loss reaches the policy alone. With a done
    head, ``loss_termination`` is its binary cross-entropy.

    The rollout, with what the heads say at each of its steps, is one :meth:`WorldModelEnv.rollout
    <fastwm.WorldModelEnv.rollout>` with gradients, on the engine that ``backend`` names.

    Args:
        world_model: whose reward head and done head also write their logits: see
            :func:`fastwm.models.tdmpc2`.
        actor_network: latent to action, its log-probability and its entropy bonus.
        qvalue_network: latent and action to logits ``[*B, N, bins]``; its parameters are stacked over
            the N functions. Target parameters are made of it: update them by
            ``torchrl.objectives.SoftUpdate(loss, tau=0.01)``.

    Keyword Args:
        discount: of the next value: a number, or one of each task ``[tasks]``; see
            :func:`discount_of`.
        two_hot: the bins of rewards and values. Default: 101 from -10 to 10, in symlog units.
        rho: weight of a step over that of the step before. Default 0.5.
        consistency_coef, reward_coef, value_coef, termination_coef: factors of the losses. Default 20,
            0.1, 0.1 and 1.
        entropy_coef: factor of the entropy bonus. Default 1e-4.
        scale_tau: of the running scale. Default 0.01.
        backend: ``"auto"`` (default), ``"fused"``, ``"captured"`` or ``"eager"``.

    Attributes:
        in_keys: what the batch must hold, each tensor ``[B, H, ...]``: what the encoder reads, also
            under ``"next"`` unless it is the task's index, then action, reward ``[B, H, 1]`` and
            terminated ``[B, H, 1]``.
        out_keys: ``loss_consistency``, ``loss_reward``, ``loss_value``, ``loss_termination`` with a
            done head, ``loss_policy``; and of the policy, without gradients, ``entropy``, of the
            action, and ``scale``.

    Raises:
        KeyError: the batch lacks a key; names it. Or the world model does not write logits.
        RuntimeError: action, reward or terminated of another shape; names both.

    ``loss(batch)`` gives them all at once; gradients of their sum are those of each for its own
    parameters. The official update takes the policy's after the model's step:

        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.envs import ActionScaling, GymEnv, TransformedEnv
        >>> from torchrl.objectives import SoftUpdate
        >>> from fastwm.models.tdmpc2 import tdmpc2
        >>> family = tdmpc2(TransformedEnv(GymEnv("Pendulum-v1"), ActionScaling()), size="1M")
        >>> loss, target = family.loss, SoftUpdate(family.loss, tau=0.01)
        >>> model = torch.optim.Adam(loss.parameter_groups(3e-4), lr=3e-4)
        >>> policy = torch.optim.Adam(family.policy.parameters(), lr=3e-4, eps=1e-5)
        >>> batch = TensorDict({
        ...     "observation": torch.randn(16, 3, 3),
        ...     "action": torch.rand(16, 3, 1) * 2 - 1,
        ...     "next": {
        ...         "observation": torch.randn(16, 3, 3),
        ...         "reward": torch.randn(16, 3, 1),
        ...         "terminated": torch.zeros(16, 3, 1, dtype=torch.bool),
        ...     },
        ... }, [16, 3])
        >>> losses, states = loss.model_losses(batch)
        >>> sum(losses.values()).backward()
        >>> model.step()
        >>> loss.policy_losses(states)["loss_policy"].backward()
        >>> policy.step()
        >>> target.step()
        >>> states.shape
        torch.Size([16, 4])

    Source: Hansen et al. 2024, "TD-MPC2", equations 3 to 6; every default is the official
    repository's ``config.yaml``, as is the entropy bonus (:meth:`PolicyPrior.sample
    <fastwm.models.tdmpc2.PolicyPrior.sample>`).
    """

    @dataclass
    class _AcceptedKeys:
        """The keys that :meth:`set_keys` accepts, and their defaults.

        Attributes:
            latent: Default ``"latent"``.
            action: of the batch, and as the policy writes it. Default ``"action"``.
            action_log_prob: as the policy writes it. Default ``"action_log_prob"``.
            entropy_bonus: as the policy writes it. Default ``"entropy_bonus"``.
            reward: of the batch, under ``"next"``. Default ``"reward"``.
            terminated: of the batch, under ``"next"``. Default ``"terminated"``.
            reward_logits: as the reward head writes it. Default ``"reward_logits"``.
            terminated_logits: as the done head writes it. Default ``("next", "terminated_logits")``.
            state_action_value_logits: as the Q functions write it.
                Default ``"state_action_value_logits"``.
            task_id: index of the task, where each has its own discount. Default ``"task_id"``.
        """

        latent: NestedKey = "latent"
        action: NestedKey = "action"
        action_log_prob: NestedKey = "action_log_prob"
        entropy_bonus: NestedKey = "entropy_bonus"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        reward_logits: NestedKey = "reward_logits"
        terminated_logits: NestedKey = ("next", "terminated_logits")
        state_action_value_logits: NestedKey = "state_action_value_logits"
        task_id: NestedKey = "task_id"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys

    target_qvalue_network_params: TensorDictParams
    discount: Tensor

    def __init__(
        self,
        world_model: WorldModel,
        actor_network: TensorDictModuleBase,
        qvalue_network: TensorDictModuleBase,
        *,
        discount: float | Sequence[float] | Tensor = 0.99,
        two_hot: TwoHot | None = None,
        rho: float = 0.5,
        consistency_coef: float = 20.0,
        reward_coef: float = 0.1,
        value_coef: float = 0.1,
        termination_coef: float = 1.0,
        entropy_coef: float = 1e-4,
        scale_tau: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.world_model = world_model
        self.actor_network = actor_network
        # Not convert_to_functional: a deepcopy would part its parameters from the network's.
        self.qvalue_network = qvalue_network
        self.target_qvalue_network_params = TensorDictParams(
            self.qvalue_network_params.apply(lambda p: nn.Buffer(p.detach().clone())),
            no_convert=True,
        )
        self._has_update_associated["qvalue_network"] = False
        # For parameters other than the network's own, which stay where they are: an engine that
        # holds a plan for the network would take every exchange for news.
        self.__dict__["_any_qvalue_network"] = deepcopy(qvalue_network).to("meta")
        self.two_hot = TwoHot() if two_hot is None else two_hot
        self.rho = rho
        self.consistency_coef = consistency_coef
        self.reward_coef = reward_coef
        self.value_coef = value_coef
        self.termination_coef = termination_coef
        self.entropy_coef = entropy_coef
        self.backend = check_name(backend)
        self.scale = RunningScale(scale_tau)
        self.register_buffer("discount", torch.as_tensor(discount, dtype=torch.float32))
        self.__dict__["_env"] = None

    # ---------------------------------------------------------------- keys

    @property
    def in_keys(self) -> list[NestedKey]:
        """What the batch must hold; see the class."""
        keys = self.tensor_keys
        read = [unravel_key(key) for key in self.world_model.encoder.in_keys]
        following = [unravel_key(("next", key)) for key in read if key != keys.task_id]
        targets = [unravel_key(("next", key)) for key in (keys.reward, keys.terminated)]
        per_task = [unravel_key(keys.task_id)] if self.discount.ndim else []
        return list(dict.fromkeys([*read, *per_task, keys.action, *following, *targets]))

    @property
    def out_keys(self) -> list[NestedKey]:
        """What a call returns; see the class."""
        end = ["loss_termination"] if self.world_model.done_head is not None else []
        model = ["loss_consistency", "loss_reward", "loss_value", *end]
        return [*model, "loss_policy", "entropy", "scale"]

    def _forward_value_estimator_keys(self, **kwargs: Any) -> None:
        # There is no value estimator; set_keys() calls this after a change.
        self.__dict__["_env"] = None

    def parameter_groups(self, lr: float, enc_lr_scale: float = 0.3) -> list[dict[str, Any]]:
        """All parameters but the policy's, for an optimizer; the encoder's own learning rate is
        ``lr * enc_lr_scale`` (a task's embedding has ``lr``), as official."""
        everything = [*self.world_model.parameters(), *self.qvalue_network.parameters()]
        embeddings = {
            id(parameter)
            for module in self.world_model.encoder.modules()
            if isinstance(module, nn.Embedding)
            for parameter in module.parameters()
        }
        slow = [p for p in self.world_model.encoder.parameters() if id(p) not in embeddings]
        slow_ids = {id(p) for p in slow}
        rest = [p for p in everything if id(p) not in slow_ids]
        return [{"params": slow, "lr": lr * enc_lr_scale}, {"params": rest, "lr": lr}]

    @property
    def qvalue_network_params(self) -> TensorDictBase:
        """The Q functions' parameters, as torchrl's target updaters look for them."""
        return TensorDict.from_module(self.qvalue_network)

    # ---------------------------------------------------------------- losses

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """All losses of a batch ``[B, H]``, as scalars; the policy's with the Q functions as they are."""
        losses, states = self.model_losses(tensordict)
        return losses.update(self.policy_losses(states))

    def model_losses(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        """The losses of encoder, dynamics, heads and Q functions, and what the policy's losses need.

        Args:
            tensordict: batch ``[B, H]`` with :attr:`in_keys`.

        Returns:
            the losses; and the latents of the rollout with what is constant in it, ``[B, H + 1]``,
            without gradients.
        """
        self._check(tensordict)
        keys = self.tensor_keys
        action = tensordict.get(keys.action)
        horizon = action.shape[1]
        latent = unravel_key(keys.latent)
        bins = (self.two_hot.low, self.two_hot.high)

        start = self._encoded(tensordict, following=False)
        with torch.no_grad():
            reached = self._encoded(tensordict, following=True)
            target = self._value_target(tensordict, reached)

        heads = self._rollout(start, action)
        latents = heads.get(("next", latent))
        weight = self.rho ** torch.arange(horizon, device=action.device, dtype=latents.dtype)
        weight = weight / horizon

        error = (latents - reached.get(latent)).square().mean((0, -1))
        reward = tensordict.get(("next", keys.reward))
        of_reward = two_hot_cross_entropy(heads.get(("next", "reward_logits")), reward, bins)
        logits = heads.get(("next", "value_logits"))
        of_value = two_hot_cross_entropy(logits, target.expand(logits.shape[:-1]), bins)
        losses = {
            "loss_consistency": self.consistency_coef * error @ weight,
            "loss_reward": self.reward_coef * of_reward.mean(0) @ weight,
            "loss_value": self.value_coef * of_value.mean((0, -1)) @ weight,
        }
        if self.world_model.done_head is not None:
            ended = tensordict.get(("next", keys.terminated)).to(latents.dtype)
            predicted = heads.get(("next", "ending_logits"))
            of_end = functional.binary_cross_entropy_with_logits(predicted, ended)
            losses["loss_termination"] = self.termination_coef * of_end

        states = start.apply(lambda t: t.detach()[:, None].expand(-1, horizon + 1, *t.shape[1:]))
        states.batch_size = torch.Size([action.shape[0], horizon + 1])
        all_latents = torch.cat((start.get(latent)[:, None], latents), 1)
        states.set(latent, all_latents.detach())
        return TensorDict(losses), states

    def policy_losses(self, states: TensorDictBase) -> TensorDictBase:
        """The policy's loss, entropy and scale, on what :meth:`model_losses` returned: ``[B, H + 1]``."""
        keys = self.tensor_keys
        acted = self.actor_network(states.copy())
        value = self._pair_of_values(self.qvalue_network_params, acted, self.training).mean(-1)
        self.scale.update(value[:, 0])
        weight = self.rho ** torch.arange(value.shape[1], device=value.device, dtype=value.dtype)
        bonus = acted.get(keys.entropy_bonus).squeeze(-1)
        gain = (self.scale(value) + self.entropy_coef * bonus).mean(0)
        return TensorDict(
            {
                "loss_policy": -(gain * weight).mean(),
                "entropy": -acted.get(keys.action_log_prob).detach().mean(),
                "scale": self.scale.value.clone(),
            }
        )

    # ---------------------------------------------------------------- pieces

    def _check(self, tensordict: TensorDictBase) -> None:
        for key in self.in_keys:
            if tensordict.get(key, None) is None:
                found = sorted(tensordict.keys(True, True), key=str)
                raise KeyError(
                    f"TDMPC2Loss needs {key!r}, which the batch lacks (set_keys() changes some keys). "
                    f"The batch has {found}."
                )
        keys = self.tensor_keys
        action = tensordict.get(keys.action)
        if action.ndim != 3:
            raise RuntimeError(
                f"TDMPC2Loss takes sequences: {keys.action!r} must be [B, H, A], "
                f"its shape is {tuple(action.shape)}."
            )
        for name in (keys.reward, keys.terminated):
            shape, want = tensordict.get(("next", name)).shape, (*action.shape[:2], 1)
            if shape != want:
                raise RuntimeError(
                    f"TDMPC2Loss needs {unravel_key(('next', name))!r} of shape {want} beside "
                    f"actions of shape {tuple(action.shape)}, its shape is {tuple(shape)}."
                )

    def _encoded(self, tensordict: TensorDictBase, *, following: bool) -> TensorDictBase:
        """What the encoder writes of the first observations ``[B]``, or of those that followed
        ``[B, H]``."""
        keys = self.tensor_keys
        size = tensordict.get(keys.action).shape[: 2 if following else 1]
        seen = TensorDict({}, batch_size=size)
        for key in self.world_model.encoder.in_keys:
            if not following:
                seen.set(key, tensordict.get(key)[:, 0])
            elif key == keys.task_id:
                seen.set(key, tensordict.get(key))
            else:
                seen.set(key, tensordict.get(("next", key)))
        return self.world_model.encode(seen).select(*self.world_model.encoder.out_keys)

    def _value_target(self, tensordict: TensorDictBase, reached: TensorDictBase) -> Tensor:
        """``[B, H, 1]``"""
        keys = self.tensor_keys
        acted = self.actor_network(reached.copy())
        value = self._pair_of_values(self.target_qvalue_network_params, acted, False).amin(-1)
        discount = self.discount
        if discount.ndim:
            task = tensordict.get(keys.task_id)
            discount = discount[task].reshape(*value.shape)
        reward = tensordict.get(("next", keys.reward))
        going_on = 1 - tensordict.get(("next", keys.terminated)).to(reward.dtype)
        return reward + going_on * (discount * value).unsqueeze(-1)

    def _pair_of_values(
        self, params: TensorDictBase, acted: TensorDictBase, training: bool
    ) -> Tensor:
        """What two of the Q functions with these parameters expect, ``[..., 2]``; gradients reach the
        action, not the parameters."""
        network: TensorDictModuleBase = self.__dict__["_any_qvalue_network"].train(training)
        count = next(params.values(True, True)).shape[0]
        pair = torch.randperm(count, device=acted.device)[:2]
        with params.data.apply(lambda p: p[pair]).to_module(network):
            logits = network(acted).get(self.tensor_keys.state_action_value_logits)
        return self.two_hot(logits).squeeze(-1)

    def _rollout(self, start: TensorDictBase, action: Tensor) -> TensorDictBase:
        """Latents and the heads' logits of H steps from the start, under ``"next"``: ``[B, H]``."""
        env: WorldModelEnv | None = self.__dict__["_env"]
        if env is None or env.device != action.device:
            env = self.__dict__["_env"] = self._make_env(start, action)
        env.backend = self.backend
        return env.rollout(
            action.shape[1],
            actions=action.unbind(1),
            tensordict=start,
            break_when_any_done=False,
        )

    def _make_env(self, start: TensorDictBase, action: Tensor) -> WorldModelEnv:
        keys, model = self.tensor_keys, self.world_model
        parts = [model.dynamics, model.reward_head, self.qvalue_network]
        heads = {
            "reward_logits": keys.reward_logits,
            "value_logits": keys.state_action_value_logits,
        }
        if model.done_head is not None:
            parts.append(model.done_head)
            heads["ending_logits"] = keys.terminated_logits
        step = HeadsStep(parts, keys.latent, heads)
        return training_env(step, start, keys.action, action[:, 0], self.backend)
