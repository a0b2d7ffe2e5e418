"""`RSSMRollout`: the posterior of a recurrent state-space model along a sequence of real data.

A step of it (prior, then posterior on what was observed) is a step of an imagined rollout whose
"action" is all that the sequence holds at that step: action, embedding, reset flag. So it needs no
engine of its own: an internal :class:`fastwm.WorldModelEnv` runs it, forward and backward.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey, unravel_key
from torch import Tensor

from fastwm.backends import check_name, requested
from fastwm.env import WorldModelEnv
from fastwm.explain import Explanation
from fastwm.models.rssm.sequence import (
    Sequence,
    SequenceModel,
    SequenceSpecs,
    SequenceStep,
    cleared,
)
from fastwm.specs import has_lazy, next_key

__all__ = ["RSSMRollout"]

# Internal envs kept, one per kind of batch.
_ENVS = 8


class RSSMRollout(TensorDictModuleBase):
    """Prior and posterior along a sequence, each step from the posterior of the one before.

    A drop-in for ``torchrl.modules.RSSMRollout`` and ``RSSMRolloutV3``: the same inputs, outputs,
    random numbers (on the CPU) and ``state_dict``, with the whole sequence and its gradients run in
    one call of the fused engine where that takes the modules, else by the captured one. Instead of
    their arguments for ``torch.compile`` (``use_scan``, ``compile_step``) there is ``backend``.

    Where the reset flag of a row is set, the row's state, belief and action are zero before the
    step, as in ``RSSMRolloutV3``. For that to be right a row must hold the action *that led to* its
    observation, an episode's first observation having a row of its own:
    :func:`fastwm.models.insert_resets` makes such rows from ordinary transitions. torchrl's first
    ``RSSMRollout`` knows no flag: give ``reset_key=None`` for that.

    Args:
        rssm_prior: TensorDict module, e.g. of ``torchrl.modules.RSSMPrior``:
            ``(state, belief, action) -> (("next", "prior_mean"), ("next", "prior_std"),
            ("next", "state"), ("next", "belief"))``.
        rssm_posterior: TensorDict module, e.g. of ``torchrl.modules.RSSMPosterior``:
            ``(("next", "belief"), ("next", "encoded_latents")) -> (("next", "posterior_mean"),
            ("next", "posterior_std"), ("next", "state"))``.

    Keyword Args:
        reset_key: boolean ``[*B, T]`` or ``[*B, T, 1]``; a batch without it has no resets. None: not
            looked for. Default ``"is_init"``.
        action_key: what a reset clears besides the latents. Default: the one key that the prior
            reads and does not carry; where there are several, ``"action"``.
        backend: of the internal env, see :class:`fastwm.WorldModelEnv`. ``"eager"`` is a loop over
            the two modules, and the definition.

    Attributes:
        carried: the latents: read at the root and written under ``"next"``.

    Raises:
        ValueError: the modules carry no latent; the action cannot be told; unknown ``backend``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import RSSMPosterior, RSSMPrior
        >>> from fastwm.models import RSSMRollout
        >>> latent = [("next", "state"), ("next", "belief")]
        >>> prior = Mod(
        ...     RSSMPrior(torch.zeros(2), 8, 8, state_dim=3, action_dim=2),
        ...     ["state", "belief", "action"], [("next", "prior_mean"), ("next", "prior_std"), *latent],
        ... )
        >>> posterior = Mod(
        ...     RSSMPosterior(8, state_dim=3, rnn_hidden_dim=8, obs_embed_dim=5),
        ...     [("next", "belief"), ("next", "encoded_latents")],
        ...     [("next", "posterior_mean"), ("next", "posterior_std"), ("next", "state")],
        ... )
        >>> batch = TensorDict({
        ...     "state": torch.zeros(4, 7, 3), "belief": torch.zeros(4, 7, 8),
        ...     "action": torch.randn(4, 7, 2), "is_init": torch.rand(4, 7, 1) < 0.1,
        ...     "next": {"encoded_latents": torch.randn(4, 7, 5)},
        ... }, [4, 7])
        >>> RSSMRollout(prior, posterior)(batch)["next", "posterior_mean"].shape
        torch.Size([4, 7, 3])

    Source: Hafner et al. 2019, "Learning Latent Dynamics for Planning from Pixels" (PlaNet),
    section 3; the contract is that of torchrl 0.14's classes.
    """

    def __init__(
        self,
        rssm_prior: TensorDictModuleBase,
        rssm_posterior: TensorDictModuleBase,
        *,
        reset_key: NestedKey | None = "is_init",
        action_key: NestedKey | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        both = TensorDictSequential(rssm_prior, rssm_posterior)
        self.in_keys = both.in_keys
        self.out_keys = [key for key in both.out_keys if key != "_"]
        self.rssm_prior = rssm_prior
        self.rssm_posterior = rssm_posterior
        self.reset_key = None if reset_key is None else unravel_key(reset_key)
        self.backend = check_name(backend)

        reads = list(map(unravel_key, self.in_keys))
        writes = list(map(unravel_key, self.out_keys))
        self.carried = [key for key in reads if next_key(key) in writes]
        if not self.carried:
            raise ValueError(
                f"Prior and posterior carry no latent: they read {reads} and write {writes}; "
                'a latent is read as "state" and written as ("next", "state").'
            )
        self._given = [key for key in reads if key not in self.carried]
        self.action_key = self._told_action(action_key)
        # What is not under "next" has no place in an env's step.
        self._as_env = all(isinstance(key, tuple) and key[0] == "next" for key in writes)

    def _told_action(self, action_key: NestedKey | None) -> NestedKey | None:
        if action_key is not None:
            return unravel_key(action_key)
        found = [k for k in map(unravel_key, self.rssm_prior.in_keys) if k not in self.carried]
        if len(found) > 1 and "action" not in found and self.reset_key is not None:
            raise ValueError(
                f"Which of {found} is the action, which a reset clears? Give action_key=."
            )
        return "action" if "action" in found else found[0] if found else None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run along the last batch dim.

        Args:
            tensordict: batch ``[*B, T]`` with every key of ``in_keys`` that the modules cannot do
                without. Of the latents (``state``, ``belief``) only those of the first step count.

        Returns:
            A new tensordict ``[*B, T]``: what was given, the latents that each step began with, and
            every key of ``out_keys``. Where there are reset flags, latents and action as the step
            saw them.

        Raises:
            KeyError: a latent or another input is missing; names it.
            ValueError: no time dim; a reset flag that is not boolean or of another shape.
            RuntimeError: an engine asked for by name that cannot run this.
        """
        if tensordict.batch_dims > 2:  # torch's GRUCell takes one batch dim
            *batch, _ = tensordict.batch_size
            return self(tensordict.flatten(0, -2)).unflatten(0, batch)
        sequence = self._read(tensordict)
        name = requested(self.backend)
        reason = self._why_loop(sequence)
        if name == "eager" or reason or torch.compiler.is_compiling():
            if reason and name in ("fused", "captured"):
                raise RuntimeError(f"backend={name!r} cannot run this: {reason}.")
            found = self._loop(sequence)
        else:
            found = self._env(sequence).rollout(**self._call(sequence))
        out = tensordict.exclude(*self.out_keys)
        for key in self.carried:
            out.set(key, cleared(found.get(key), sequence.reset))
        if sequence.reset is not None and self.action_key in sequence.given:
            assert self.action_key is not None
            out.set(self.action_key, cleared(sequence.given[self.action_key], sequence.reset))
        for key in self.out_keys:
            out.set(key, found.get(key))
        return out

    def explain(self, tensordict: TensorDictBase) -> Explanation:
        """Which engine would run this batch, and why not a faster one; nothing is rolled out."""
        flat = tensordict.flatten(0, -2) if tensordict.batch_dims > 2 else tensordict
        sequence = self._read(flat)
        reason = self._why_loop(sequence)
        if reason:
            return Explanation("eager", {"fused": reason, "captured": reason}, self.backend)
        return self._env(sequence).explain(**self._call(sequence))

    def _why_loop(self, sequence: Sequence) -> str:
        """Why the internal env cannot take this, if it cannot."""
        if has_lazy(self):
            return "lazy parameters are not initialised yet"
        if not self._as_env:
            return f'keys outside of "next" are written: {self.out_keys}'
        if not sequence.one_dtype:
            return "the inputs differ in dtype from the latents"
        return ""

    def _read(self, tensordict: TensorDictBase) -> Sequence:
        batch = tensordict.batch_size
        if not batch or not batch[-1]:
            raise ValueError(
                f"An RSSM rollout needs a batch [*B, T] of at least one step, got {list(batch)}."
            )
        for key in self.carried:
            if tensordict.get(key, None) is None:
                raise KeyError(
                    f"The batch has no {key!r}, the latent to begin with; it has "
                    f"{sorted(map(str, tensordict.keys(True, True)))}."
                )
        start = {key: tensordict.get(key).select(len(batch) - 1, 0) for key in self.carried}
        found = {key: tensordict.get(key, None) for key in self._given}
        reset = None if self.reset_key is None else tensordict.get(self.reset_key, None)
        if reset is not None:
            if reset.dtype is not torch.bool or reset.numel() != batch.numel():
                raise ValueError(
                    f"The reset flag {self.reset_key!r} must be boolean of shape {list(batch)} or "
                    f"{[*batch, 1]}, got {reset.dtype} of shape {list(reset.shape)}."
                )
            reset = reset.reshape(batch)
        return Sequence(
            batch,
            start,
            {key: value for key, value in found.items() if value is not None},
            [key for key, value in found.items() if value is None],
            reset,
            self.action_key,
        )

    # ---------------------------------------------------------------- one step, and the definition

    def _step(
        self, row: dict[NestedKey, Tensor], batch: torch.Size, missing: list[NestedKey]
    ) -> TensorDictBase:
        """Prior and posterior. What is missing may be optional (noise): the modules decide."""
        try:
            return self.rssm_posterior(self.rssm_prior(TensorDict(row, batch)))
        except (KeyError, TypeError, AttributeError) as error:
            if not missing:
                raise
            raise KeyError(
                f"The batch has no {missing[0]!r}, which the prior or the posterior reads "
                f"(all that it lacks: {missing})."
            ) from error

    def _loop(self, sequence: Sequence) -> TensorDictBase:
        batch, latents = sequence.batch[:-1], sequence.start
        steps = []
        for t in range(sequence.batch[-1]):
            out = self._step(sequence.row(latents, t), batch, sequence.missing)
            written = {key: out.get(key) for key in self.out_keys}
            steps.append(TensorDict({**latents, **written}, batch))
            latents = {key: out.get(next_key(key)) for key in self.carried}
        return torch.stack(steps, len(batch))

    # ---------------------------------------------------------------- the env of a kind of batch

    def _call(self, sequence: Sequence) -> dict[str, Any]:
        """Arguments of the internal env's rollout."""
        return {
            "max_steps": sequence.batch[-1],
            "actions": sequence.rows(),
            "tensordict": TensorDict(sequence.start, sequence.batch[:-1]),
            "break_when_any_done": False,
        }

    def _env(self, sequence: Sequence) -> WorldModelEnv:
        envs: dict[Any, WorldModelEnv] = self.__dict__.setdefault("_envs", {})
        kind = id(self.rssm_prior), id(self.rssm_posterior), sequence.kind()
        if kind not in envs:
            if len(envs) >= _ENVS:
                del envs[next(iter(envs))]
            envs[kind] = WorldModelEnv(
                SequenceModel(
                    SequenceStep(self.rssm_prior, self.rssm_posterior, self.out_keys, sequence)
                ),
                SequenceSpecs(sequence, self._written(sequence)),
                batch_size=[],
                device=sequence.device,
                latent_key=self.carried[0],
            )
        envs[kind].backend = self.backend
        return envs[kind]

    def _written(self, sequence: Sequence) -> dict[NestedKey, Tensor]:
        """What a step writes besides the latents, of one row, by key under "next"."""
        cuda = [sequence.device] if sequence.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), torch.no_grad():
            out = self._step(sequence.first_row(), torch.Size([1]), sequence.missing)
        latents = [next_key(key) for key in self.carried]
        keys = [key for key in map(unravel_key, self.out_keys) if key not in latents]
        return {unravel_key(key[1:]): out.get(key)[0] for key in keys}

    def __getstate__(self) -> dict[str, Any]:
        # The envs hold the modules of the original; a copy makes its own.
        return {key: value for key, value in super().__getstate__().items() if key != "_envs"}
