"""`WorldModelEnv`: a world model as a TorchRL environment, stepped in latent space."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey, unravel_key
from torchrl.data import Composite, ReplayBuffer, TensorSpec
from torchrl.envs import EnvBase
from torchrl.envs.common import _cache_value
from torchrl.envs.model_based import ModelBasedEnvBase

from fastwm.fast_env import FastEnv
from fastwm.plan import zero_done
from fastwm.request import Request
from fastwm.specs import (
    has_lazy,
    nested_groups,
    next_key,
    probe_encoder,
    rebatch,
    step_keys,
    unbounded,
    with_leaf,
)
from fastwm.wiring import MissingKeyError, check_step_wiring, missing_of

__all__ = ["WorldModelEnv"]

InitialState: TypeAlias = TensorDictBase | ReplayBuffer | Callable[[torch.Size], TensorDictBase]


class WorldModelEnv(FastEnv, ModelBasedEnvBase):
    """A world model as an environment that imagines: ``reset``, ``step``, ``rollout`` in latent space.

    A drop-in for ``torchrl.envs.WorldModelEnv``. Only :meth:`rollout` differs in how it runs: the
    whole horizon goes to the fastest engine that can take it (see ``backend``), with the values,
    keys, shapes and random numbers of the step-by-step path.

    Every key that the step reads and also writes under ``"next"`` is carried from step to step (one
    latent, or several, as a recurrent state-space model's state and belief). A key that is only read
    is context and stays constant.

    Args:
        world_model: anything with ``step_module`` (a TensorDict module) and, for ``initial_state`` made
            of observations, ``encode``: :class:`fastwm.WorldModel` or torchrl's own.
        base_env: the env whose action, reward and done specs are taken; it is never stepped. Its batch
            dims are replaced by this env's, so rewards are ``[*batch_size, 1]``.

    Keyword Args:
        observation_spec: what the env exposes. Carried latents that it lacks are added. Default: the
            carried latents, shapes taken from ``base_env``'s specs where it has the key, else from the
            encoder, else from the first data seen.
        batch_size: default ``base_env.batch_size``, ``[1]`` when that is empty. With ``[]`` the env takes
            tensordicts of any batch size (planners want this). Extra *leading* dims are always accepted.
        device: default ``base_env.device``. The step module is moved there.
        latent_key: the main latent. Default ``"latent"``.
        done_threshold: a floating-point done flag ``p`` counts as done where ``p > done_threshold``.
            Integers count where nonzero. Default 0.5.
        initial_state: where :meth:`reset` without a tensordict takes its start from: a TensorDict of batch
            ``[*batch_size]`` (or ``[]``), a callable ``(batch_size) -> TensorDict``, or a replay buffer of
            real observations, sampled and encoded. With it, finished rows restart in non-stop rollouts.
        backend: ``"auto"`` (the fastest engine that can run), ``"fused"``, ``"captured"`` or ``"eager"``.
            :class:`fastwm.backend` and the variable ``FASTWM_BACKEND`` choose for a block or a process.
        fused_weights: ``torch.bfloat16`` lets the fused engine round matrices to bfloat16 (products and
            sums stay float32; on CUDA what a matrix is multiplied with is rounded too, for its tensor
            cores), in rollouts without gradients: half the memory to read at small batches, at the
            precision of ``("rollout.bf16_weights", ...)`` in :mod:`fastwm.tolerances`. Rollouts with
            gradients and float64 models then run on the captured engine. Default: as they are.
        fused_noise: ``"kernel"`` lets the fused engine's kernel on CUDA draw normal, uniform and exponential
            numbers itself, where it reads them, in no memory. They are distributed as eager's, but other
            numbers: repeatable after ``torch.manual_seed``, from torch's generator by one key per rollout (of
            64 steps, where a flag may end it). Other draws stay torch's, and so do all on the CPU, where
            ``backend="fused"`` by name is then an error. Default ``"torch"``: the numbers that eager draws.

    Raises:
        ValueError: the step reads ``latent_key`` but never writes it under ``"next"``, so that it could
            never advance; a part of the step reads a key under ``"next"`` that none before it writes; or an
            unknown ``backend``, ``fused_weights`` or ``fused_noise``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.envs import GymEnv
        >>> from torchrl.modules import MLP
        >>> import fastwm
        >>> base_env = GymEnv("Pendulum-v1")
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(3, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(5, 4, depth=0), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> env = fastwm.WorldModelEnv(world_model, base_env, batch_size=[3])
        >>> policy = Mod(torch.nn.Linear(4, 1), in_keys=["latent"], out_keys=["action"])
        >>> start = world_model.encode(TensorDict({"observation": torch.randn(3, 3)}, [3]))
        >>> rollout = env.rollout(5, policy, tensordict=start)
        >>> rollout.shape, rollout["next", "reward"].shape
        (torch.Size([3, 5]), torch.Size([3, 5, 1]))

    Source: TorchRL 0.14's ``WorldModelEnv``; its rollout contract is ``torchrl.envs.EnvBase.rollout``.
    """

    # reset(set_state=True) is what this env always does with a latent it is given.
    _supports_set_state = True
    _world_model: Any

    def __init__(
        self,
        world_model: torch.nn.Module,
        base_env: EnvBase,
        *,
        observation_spec: Composite | None = None,
        batch_size: int | torch.Size | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        latent_key: NestedKey = "latent",
        done_threshold: float = 0.5,
        initial_state: InitialState | None = None,
        backend: str = "auto",
        fused_weights: torch.dtype | None = None,
        fused_noise: str = "torch",
    ) -> None:
        if batch_size is None:
            batch_size = base_env.batch_size if base_env.batch_dims else torch.Size([1])
        batch_size = torch.Size([batch_size] if isinstance(batch_size, int) else batch_size)
        super().__init__(
            world_model.step_module,
            device=base_env.device if device is None else device,
            batch_size=batch_size,
            # An imagined trajectory may be done from its first step.
            allow_done_after_reset=True,
        )
        self._world_model = world_model
        self.latent_key = unravel_key(latent_key)
        self.done_threshold = done_threshold
        self.initial_state = initial_state
        self.choose_engine(backend, fused_weights, fused_noise)

        def taken(spec: TensorSpec) -> TensorSpec:
            spec = rebatch(spec, base_env.batch_dims, self.batch_size)
            return spec if self.device is None else spec.to(self.device)

        self.full_action_spec = taken(base_env.full_action_spec)
        self.full_reward_spec = taken(base_env.full_reward_spec)
        self.full_done_spec = taken(base_env.full_done_spec)

        self.step_keys = step_keys(self.world_model, list(self.full_action_spec.keys(True, True)))
        if self.latent_key in self.step_keys.context:
            raise ValueError(
                f"The step reads the latent {self.latent_key!r} but writes no {next_key(self.latent_key)!r}: "
                f"the latent would never advance. The step writes {list(self.world_model.out_keys)}."
            )
        known = taken(Composite(
            {**dict(base_env.full_state_spec.items()), **dict(base_env.full_observation_spec.items())},
            shape=base_env.batch_size,
        ))  # fmt: skip
        self._set_latent_specs(observation_spec, known, base_env)
        check_step_wiring(
            self.world_model, world_model, self.full_state_spec, self.full_action_spec
        )

    # ---------------------------------------------------------------- specs

    def _set_latent_specs(
        self, observation_spec: Composite | None, known: Composite, base_env: EnvBase
    ) -> None:
        if observation_spec is None:
            observation = Composite(shape=self.batch_size, device=self.device)
        else:
            observation = observation_spec.clone()
        state = Composite(shape=self.batch_size, device=self.device)
        groups = nested_groups(
            len(self.batch_size),
            self.full_action_spec, self.full_reward_spec, self.full_done_spec, known,
        )  # fmt: skip
        self._keys_without_spec: tuple[NestedKey, ...] = ()
        given = set(observation.keys(True, True))
        in_base = set(known.keys(True, True))
        encoded: TensorDictBase | None = None
        probed = False
        missing = []
        for key in self.step_keys.required:
            if key in given:
                leaf = observation[key]
            elif key in in_base:
                leaf = known[key]
            else:
                if not probed:
                    encoded, probed = probe_encoder(self._world_model, base_env, self.device), True
                value = None if encoded is None else encoded.get(key, None)
                if value is None:
                    missing.append(key)
                    continue
                leaf = unbounded(value, 1, self.batch_size, self.device)
            with_leaf(state, key, leaf.clone(), groups)
            if key in self.step_keys.carried and key not in given:
                with_leaf(observation, key, leaf, groups)
        self.observation_spec = observation
        self.state_spec = state
        self._keys_without_spec = tuple(missing)
        if missing and self.initial_state is not None:
            self._complete_specs_from_initial_state()

    def _complete_specs_from_initial_state(self) -> None:
        """Take missing specs from one start, so that ``fake_tensordict`` knows all keys at once.

        Not with lazy parameters: a probe must not be the one to initialise them.
        """
        if has_lazy(self._world_model):
            return
        cuda = [self.device] if self.device is not None and self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(cuda), torch.no_grad():
                self._complete_specs(self._draw_initial_state(self.batch_size))
        except Exception:  # e.g. a buffer that is still empty; the first reset raises in the open
            return

    def _complete_specs(self, tensordict: TensorDictBase) -> None:
        """Take the specs that nothing told us at construction from the first data seen."""
        found = [k for k in self._keys_without_spec if tensordict.get(k, None) is not None]
        if not found:
            return
        observation, state = self.full_observation_spec.clone(), self.full_state_spec.clone()
        groups = dict(self._nested_groups)
        for key in found:
            leaf = unbounded(
                tensordict.get(key), tensordict.batch_dims, self.batch_size, self.device
            )
            with_leaf(state, key, leaf, groups)
            if key in self.step_keys.carried:
                with_leaf(observation, key, leaf.clone(), groups)
        self.observation_spec, self.state_spec = observation, state
        self._keys_without_spec = tuple(k for k in self._keys_without_spec if k not in found)
        self.empty_cache()

    @property
    @_cache_value
    def _nested_groups(self) -> list[tuple[NestedKey, torch.Size]]:
        """Groups of the specs with batch dims of their own, as ``agents: [*batch, N]``, outer first."""
        specs = (
            self.full_action_spec, self.full_reward_spec, self.full_done_spec,
            self.full_observation_spec, self.full_state_spec,
        )  # fmt: skip
        return list(nested_groups(len(self.batch_size), *specs).items())

    def _assert_tensordict_shape(self, tensordict: TensorDictBase) -> None:
        dims = len(self.batch_size)
        if dims and tensordict.batch_size[-dims:] != self.batch_size:
            raise RuntimeError(
                "Expected a tensordict with shape==env.batch_size (extra leading dims are accepted), "
                f"got {tensordict.batch_size} and {self.batch_size}. An env with batch_size=[] takes any "
                "batch, which is what planners want."
            )

    # ---------------------------------------------------------------- rollout

    def own_start(self, request: Request) -> TensorDictBase | None:
        """The caller's start, ours to write into, without what another step left under ``"next"``.

        Where no reset will do it, flags that are not there are cleared: otherwise the first step alone
        would lack them, and the steps would not stack.
        """
        start = super().own_start(request)
        if start is None:
            return None
        start.pop("next", None)
        if not request.auto_reset:
            self._assert_tensordict_shape(start)
            for key, value in zero_done(self, start.batch_size).items():
                if start.get(key, None) is None:
                    start.set(key, value.clone())
        return start

    def begun(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The start with flags of its own: those of a plain start are shared, and read only."""
        start = tensordict.copy()
        for key in self.done_keys:
            flag = start.get(key, None)
            if flag is not None:
                start.set(key, flag.clone())
        return start

    def diagnose(self, request: Request, error: Exception) -> None:
        """Say so where the policy, or the step, reads a key that is not there."""
        if isinstance(error, MissingKeyError):
            return
        if request.tensordict is None and not request.auto_reset:
            return  # no start at all, which the error says
        cause = error.__cause__
        while cause is not None:  # an engine by name says that it cannot, because of it
            if isinstance(cause, MissingKeyError):
                raise MissingKeyError(*cause.args) from error
            cause = cause.__cause__
        start = TensorDict() if request.tensordict is None else request.tensordict.exclude("next")
        there = {unravel_key(key) for key in (*start.keys(True, True), *self.done_keys)}
        if request.auto_reset:  # what no reset could do without
            there |= {*self.step_keys.required}
        missing = missing_of(request.own_policy, there)
        if missing is not None:
            raise MissingKeyError(
                f"The policy reads {missing.key!r}, which is not there: a step begins with "
                f"{sorted(there, key=str)}."
            ) from error

    @property
    def restart(self) -> str:
        return "" if self.initial_state is None else "finished rows restart from initial_state"

    def unwatched(self) -> list[Any]:
        """Where starts come from, asked anew at each rollout; and the encoder and decoder."""
        found = [*super().unwatched(), self.initial_state]
        libraries = ("fastwm", "torchrl")
        if all(
            type(o).__module__.partition(".")[0] in libraries for o in (self, self._world_model)
        ):
            # The step is in self.world_model. That of a class of the user's may refer back to the whole:
            # be a bound method of it, or the very same object.
            found.append(self._world_model)
        return found

    # ---------------------------------------------------------------- step

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step; with a mask under ``"_step"``, of the marked rows only.

        Rows that are left out keep their state and flags, with no reward. (Upstream steps a selection
        and forgets to put it back where the batch is the env's own, so ``break_when_all_done`` fails.)
        """
        marked = tensordict.pop("_step", None)
        out = super().step(tensordict)
        if marked is not None and not marked.all():
            rows, after = marked.reshape(out.batch_size), out.get("next")
            for key, value in after.items(True, True):
                before = out.get(key, None)
                before = torch.zeros_like(value) if before is None else before
                after.set(key, _where_rows(rows, value, before))
        return out

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self._keys_without_spec:  # no reset came before this step
            self._complete_specs(tensordict)
        inputs = tensordict.copy()
        # A "next" left over from another step is not this step's prediction.
        inputs.pop("next", None)
        predicted = self._predict(inputs).get("next", None)
        if predicted is None:
            predicted = TensorDict({}, batch_size=tensordict.batch_size, device=self.device)
        self._check_closes(tensordict, predicted)
        out = TensorDict({}, batch_size=tensordict.batch_size, device=self.device)
        for key in self.full_observation_spec.keys(True, True):
            value = predicted.get(key, None)
            if value is not None:
                out.set(key, value)
        lead = self._leading(tensordict.batch_size)
        for key in self.full_reward_spec.keys(True, True):
            spec = self.full_reward_spec[key]
            value = predicted.get(key, None)
            out.set(key, spec.zero(lead) if value is None else _as_shape(key, value, spec, lead))
        self._set_done(predicted, out, lead)
        for path, tail in self._nested_groups:
            group, given = out.get(path, None), tensordict.get(path, None)
            if group is not None:
                # That of the input, so that steps stack; with none to go by, the spec's.
                size = (*out.batch_size, *tail) if given is None else given.batch_size
                group.batch_size = torch.Size(size)
        return out

    def _predict(self, inputs: TensorDictBase) -> TensorDictBase:
        try:
            return self.world_model(inputs)
        except Exception as error:
            missing = missing_of(self.world_model, inputs.keys(True, True))
            if missing is None:
                raise
            raise MissingKeyError(
                f"The step reads {missing.key!r}, which is not there: there is {_listed(inputs)}."
            ) from error

    def _check_closes(self, tensordict: TensorDictBase, predicted: TensorDictBase) -> None:
        """A latent that changes shape in a step fails here, not as a matrix product a step later."""
        for key in self.step_keys.carried:
            value = predicted.get(key, None)
            if value is None:
                continue
            before, after = tensordict.get(key).shape, value.shape
            # A spec with dims of -1 is torchrl's way to announce that shapes change.
            if before != after and -1 not in self.full_observation_spec[key].shape:
                raise RuntimeError(
                    f"The step reads {key!r} of shape {tuple(before)} and writes {next_key(key)!r} of "
                    f"shape {tuple(after)}: it does not close over its latent."
                )

    def _set_done(self, predicted: TensorDictBase, out: TensorDictBase, lead: torch.Size) -> None:
        """Write every done flag of the spec, completing within each group what the model left out.

        ``done = terminated | truncated`` holds as far as the model leaves it open; with none of the
        three predicted, all are False.
        """
        for group in self.done_keys_groups:
            flags: dict[str, torch.Tensor] = {}
            for key in group:
                value = predicted.get(key, None)
                if value is not None:
                    flag = self._as_flag(value)
                    flags[_leaf(key)] = _as_shape(key, flag, self.full_done_spec[key], lead)
            done, terminated, truncated = map(flags.get, ("done", "terminated", "truncated"))
            if done is None and (terminated is not None or truncated is not None):
                parts = [flag for flag in (terminated, truncated) if flag is not None]
                flags["done"] = parts[0] | parts[1] if len(parts) == 2 else parts[0].clone()
            if terminated is None and done is not None:
                flags["terminated"] = done.clone() if truncated is None else done & ~truncated
            for key in group:
                found = flags.get(_leaf(key))
                out.set(key, self.full_done_spec[key].zero(lead) if found is None else found)

    def _as_flag(self, value: torch.Tensor) -> torch.Tensor:
        if value.dtype is torch.bool:
            return value
        if value.is_floating_point():
            return value > self.done_threshold
        return value != 0

    # ---------------------------------------------------------------- reset

    def _resolve_set_state(
        self, set_state: bool | None, tensordict: TensorDictBase | None, select_reset_only: bool
    ) -> bool | None:
        if set_state and select_reset_only:
            raise ValueError(
                "set_state=True is incompatible with select_reset_only=True: the latter strips "
                "the latent from the input tensordict before reset."
            )
        # None keeps upstream's contract: the latent in the tensordict is the start.
        return set_state

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        set_state: bool | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        absent = self._absent_keys(tensordict)
        if tensordict is not None and not absent and set_state is not False:
            start = tensordict.copy()
            start.pop("next", None)
        elif self.initial_state is not None and set_state is not True:
            start = self._draw_initial_state(
                self.batch_size if tensordict is None else tensordict.batch_size
            )
        else:
            key = absent[0] if absent else self.latent_key
            raise RuntimeError(
                f"WorldModelEnv.reset requires a tensordict carrying the initial latent under key {key!r}. "
                "Encode a real observation with `world_model.encode(obs_td)` and pass the result as "
                "`tensordict=` to `env.reset(...)` or `env.rollout(...)`, or give the env `initial_state=`."
            )
        self._complete_specs(start)
        self._check_latents(start)
        lead = self._leading(start.batch_size)
        zero_done = self.full_done_spec.zero(lead)
        for key in self.full_done_spec.keys(True, True):
            start.set(key, zero_done.get(key))
        for path, tail in self._nested_groups:
            group = start.get(path, None)
            # A caller's group may hold entries without the spec's extra dims: it stays as it is.
            size = torch.Size([*start.batch_size, *tail])
            if group is not None and all(v.shape[: len(size)] == size for v in group.values()):
                group.batch_size = size
        return start

    def _reset_proc_data(
        self, tensordict: TensorDictBase | None, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        """Write the reset data into the caller's tensordict, as every env does.

        Upstream writes only into the groups that hold done flags. Where the root holds none, a
        latent outside those groups would be lost, and a group that the caller left out raises.
        """
        if tensordict is None or "_reset" in self.reset_keys:
            return super()._reset_proc_data(tensordict, tensordict_reset)
        groups = [key[:-1] for key in self.reset_keys]
        rows = None  # which rows restart: those of which every group restarts
        for key, group in zip(self.reset_keys, groups, strict=True):
            if tensordict.get(group, None) is None:
                tensordict.set(group, tensordict_reset.get(group).empty())
            mask = tensordict.get(key, None)
            if mask is not None:
                mask = mask.reshape(*tensordict.batch_size, -1).all(-1)
                rows = mask if rows is None else rows & mask
        out = super()._reset_proc_data(tensordict, tensordict_reset)
        for key, value in tensordict_reset.items(True, True):
            key = unravel_key(key)
            if any(key[: len(group)] == group for group in groups if isinstance(key, tuple)):
                continue
            old = out.get(key, None)
            if rows is not None and old is not None:
                value = _where_rows(rows, value, old)
            out.set(key, value)
        return out

    def starts_plainly(self, tensordict: TensorDictBase) -> bool:
        """Whether ``reset(tensordict)`` would keep the latents given and clear every done flag.

        Raises:
            RuntimeError: what ``reset`` raises for a batch or a latent of another shape.
        """
        self._assert_tensordict_shape(tensordict)
        if (
            type(self)._reset is not WorldModelEnv._reset
            or self._keys_without_spec
            or self._absent_keys(tensordict)
            or any(tensordict.get(key, None) is not None for key in self.reset_keys)
            or "_reset" not in self.reset_keys
        ):
            return False
        self._check_latents(tensordict)
        return True

    def _absent_keys(self, tensordict: TensorDictBase | None) -> list[NestedKey]:
        required = self.step_keys.required or (self.latent_key,)
        if tensordict is None:
            return list(required)
        return [key for key in required if tensordict.get(key, None) is None]

    def _check_latents(self, tensordict: TensorDictBase) -> None:
        spec = self.full_state_spec
        lead = self._leading(tensordict.batch_size)
        for key in self.step_keys.required:
            if key in self._keys_without_spec:
                continue
            got, want = tensordict.get(key).shape, torch.Size([*lead, *spec[key].shape])
            fits = len(got) == len(want) and all(
                a == b or b == -1  # -1: a dim that the spec leaves open
                for a, b in zip(got, want, strict=True)
            )
            if not fits:
                raise RuntimeError(
                    f"The start's {key!r} has shape {tuple(got)}, the env expects {tuple(want)}."
                )

    def _draw_initial_state(self, batch_size: torch.Size) -> TensorDictBase:
        source = self.initial_state
        if isinstance(source, TensorDictBase):
            drawn = source
        elif isinstance(source, ReplayBuffer):
            with warnings.catch_warnings():
                # The batch size in the buffer's constructor is the training's.
                warnings.filterwarnings("ignore", "Got conflicting batch_sizes")
                drawn = source.sample(batch_size.numel()).reshape(batch_size)
        else:
            assert callable(source)
            drawn = source(batch_size)
        if drawn.batch_size != batch_size:
            if drawn.batch_size.numel() == 1:
                drawn = drawn.reshape(())
            dims = drawn.batch_dims
            if dims and drawn.batch_size != batch_size[-dims:]:
                raise RuntimeError(
                    f"initial_state has batch size {tuple(drawn.batch_size)}, "
                    f"the env needs {tuple(batch_size)}."
                )
            drawn = drawn.expand(batch_size)
        if self.device is not None:
            drawn = drawn.to(self.device)
        start, cause = drawn.copy(), None
        if self._absent_keys(start) and hasattr(self._world_model, "encode"):
            try:  # real observations: their latent is the encoder's
                start = self._world_model.encode(start)
            except KeyError as error:
                cause = error
        absent = self._absent_keys(start)
        if absent:
            raise RuntimeError(
                f"initial_state gave no {absent[0]!r}, which the step reads, nor observations to "
                f"encode it from; it gave {sorted(map(str, drawn.keys(True, True)))}."
            ) from cause
        return start.select(*self.step_keys.required, strict=False).clone()

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Restart finished rows from ``initial_state``; without one, imagination goes on."""
        if self.initial_state is None:
            return tensordict
        return super().maybe_reset(tensordict)

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        """Random actions of the action spec, ``[*lead, *batch_size, *A]``, written into ``tensordict``."""
        if tensordict is None:
            return self.full_action_spec.rand()
        self._assert_tensordict_shape(tensordict)
        return tensordict.update(self.full_action_spec.rand(self._leading(tensordict.batch_size)))

    def _set_seed(self, seed: int | None) -> None:
        """Nothing to seed: an imagined env draws from torch's global generator."""


def _listed(tensordict: TensorDictBase) -> list[NestedKey]:
    return sorted(map(unravel_key, tensordict.keys(True, True)), key=str)


def _leaf(key: NestedKey) -> str:
    return key if isinstance(key, str) else key[-1]


def _where_rows(rows: torch.Tensor, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Choose by row of the batch: ``rows`` is ``[*batch]``, the others ``[*batch, *event]``."""
    return torch.where(rows.reshape(rows.shape + (1,) * (value.ndim - rows.ndim)), value, other)


def _as_shape(
    key: NestedKey, value: torch.Tensor, spec: TensorSpec, lead: torch.Size
) -> torch.Tensor:
    shape = torch.Size([*lead, *spec.shape])
    if value.shape == shape:
        return value
    if value.numel() != shape.numel():
        raise RuntimeError(
            f"The world model wrote {next_key(key)!r} of shape {tuple(value.shape)}, "
            f"the spec says {tuple(shape)}."
        )
    return value.reshape(shape)
