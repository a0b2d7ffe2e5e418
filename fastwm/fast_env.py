"""`FastEnv`: what an imagined env owes the engines that run its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import fields
from typing import Any, Self

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from fastwm.backends import check_name
from fastwm.engines.drawing import NOISES
from fastwm.engines.inductor import inductor
from fastwm.explain import Explanation, explain
from fastwm.request import Request
from fastwm.rollout import rollout

__all__ = ["FastEnv"]

# The start of the eager rollout under way, where a reset has made it already.
_begun: ContextVar[TensorDictBase | None] = ContextVar("fastwm_begun", default=None)


class FastEnv(EnvBase):
    """An env whose :meth:`rollout` goes to the engines; for any env whose ``step`` can be traced.

    It stands before the env's own class: :class:`fastwm.WorldModelEnv` derives from it, and
    :func:`fastwm.accelerate` puts it before the class of an env that exists. The engines trace
    ``policy``, ``step`` and ``_step_mdp`` as the env has them; beyond that they ask what is below.

    Attributes:
        backend: ``"auto"``, ``"fused"``, ``"captured"`` or ``"eager"``.
        fused_weights: the dtype that the fused engine rounds matrices to; None for as they are.
        fused_noise: who draws the fused engine's noise: ``"torch"``, as eager does, or the ``"kernel"``.
    """

    backend: str = "auto"
    fused_weights: torch.dtype | None = None
    fused_noise: str = "torch"

    def choose_engine(
        self, backend: str, fused_weights: torch.dtype | None, fused_noise: str
    ) -> None:
        """Set the attributes of these names.

        Raises:
            ValueError: one of them is unknown.
        """
        check_name(backend)
        if fused_weights not in (None, torch.bfloat16):
            raise ValueError(f"fused_weights={fused_weights}; choose None or torch.bfloat16.")
        if fused_noise not in NOISES:
            raise ValueError(f"fused_noise={fused_noise!r}; choose one of {', '.join(NOISES)}.")
        self.backend = backend
        self.fused_weights = fused_weights
        self.fused_noise = fused_noise

    # ---------------------------------------------------------------- what engines ask

    def own_start(self, request: Request) -> TensorDictBase | None:
        """The caller's start, for this rollout to write into."""
        return None if request.tensordict is None else request.tensordict.copy()

    def begun(self, tensordict: TensorDictBase) -> TensorDictBase:
        """A start that a reset has made, for the eager path to go on from."""
        return tensordict

    def starts_plainly(self, tensordict: TensorDictBase) -> bool:
        """Whether ``reset(tensordict)`` would keep all entries given and clear every done flag."""
        return False

    @property
    def restart(self) -> str:
        """What becomes of finished rows in a rollout that does not stop; ``""`` where they go on."""
        return "finished rows are reset"

    def refusal(self, request: Request) -> str:
        """What of this env leaves the rollout to the eager path, or ``""``."""
        return ""

    def diagnose(self, request: Request, error: Exception) -> None:
        """Raise a clearer error, where a rollout failed and the cause of it is known."""

    def unwatched(self) -> list[Any]:
        """Reachable from the env, and without a part in the step: changes there make no plan stale."""
        # What torchrl's own cache holds follows from the specs, which are watched.
        return [self._cache, self.__dict__.get("_plans")]

    def _leading(self, batch_size: torch.Size) -> torch.Size:
        """The dims of a batch that stand before this env's own."""
        dims = len(self.batch_size)
        return torch.Size(batch_size[: len(batch_size) - dims])

    def compile_options_key(self) -> str | None:
        """Distinguishes plans by how their step is compiled."""
        options = self.__dict__.get("_step_compile_options")
        return None if options is None else repr(sorted(options.items()))

    def step_compiler(self) -> Any:
        """What compiles the captured step's body, or None."""
        options = self.__dict__.get("_step_compile_options")
        return None if options is None else inductor(**options)

    # ---------------------------------------------------------------- what users ask

    def rollout(
        self,
        max_steps: int,
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        callback: Callable[..., Any] | None = None,
        *,
        actions: Iterable[Any] | None = None,
        auto_reset: bool = True,
        auto_cast_to_device: bool = False,
        break_when_any_done: bool | None = None,
        break_when_all_done: bool | None = None,
        return_contiguous: bool | None = False,
        tensordict: TensorDictBase | None = None,
        set_truncated: bool = False,
        out: Any = None,
        trust_policy: bool = False,
        storing_device: torch.device | str | None = None,
        set_state: bool | None = None,
    ) -> TensorDictBase:
        """Imagine up to ``max_steps`` steps: ``torchrl.envs.EnvBase.rollout``, on the fastest engine.

        Takes every argument of ``EnvBase.rollout`` and returns what it returns, except that the
        ``tensordict`` given is not written into.

        Returns:
            TensorDict of batch ``[*batch, time]``, dim name ``"time"``: policy outputs and latents at the
            root, next latents, reward and done flags under ``"next"``. Its memory is the caller's.

        Raises:
            RuntimeError: no start latent; a batch or latent of another shape than the env's; or an engine
                asked for by name that cannot run this (the message says why).
        """
        request = Request(
            max_steps, policy, callback, actions, auto_reset, auto_cast_to_device,
            break_when_any_done, break_when_all_done, return_contiguous, tensordict,
            set_truncated, out, trust_policy, storing_device, set_state,
        )  # fmt: skip
        try:
            return rollout(self, request)
        except Exception as error:
            self.diagnose(request, error)
            raise

    def eager_rollout(self, request: Request) -> TensorDictBase:
        """The reference: ``EnvBase.rollout`` itself, on this env."""
        arguments = {f.name: getattr(request, f.name) for f in fields(request)}
        begun = arguments.pop("begun")
        start = arguments["tensordict"] = self.own_start(request)
        token = _begun.set(start if begun else None)
        try:
            return super().rollout(**arguments)
        finally:
            _begun.reset(token)

    def maybe_reset(self, tensordict: TensorDictBase) -> TensorDictBase:
        """``EnvBase.maybe_reset``, but for a start that a reset has just made."""
        return tensordict if tensordict is _begun.get() else super().maybe_reset(tensordict)

    def explain(
        self,
        max_steps: int = 1,
        policy: Callable[[TensorDictBase], TensorDictBase] | None = None,
        callback: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> Explanation:
        """Which engine would run ``rollout`` with these arguments, and why not a faster one.

        Nothing is rolled out; the step may be traced. Random generators are left as they were.

        Example:
            >>> print(env.explain(15, policy, tensordict=start))  # doctest: +SKIP
            fused: no, the fused engine is not part of this version
            captured: runs
        """
        return explain(self, Request(max_steps, policy, callback, **kwargs))

    def compile(self, *, warmup: int | None = None, **options: Any) -> Self:
        """Compile the captured engine's step with Inductor (also as ``compile=True`` at construction).

        One compilation per kind of input, whatever the horizon; ``options`` are ``torch.compile``'s.
        ``warmup`` is accepted for ``EnvBase.compile``'s sake. :meth:`eager` undoes it.
        """
        self.__dict__["_step_compile_options"] = options
        return self

    def eager(self) -> Self:
        """Undo :meth:`compile`."""
        self.__dict__.pop("_step_compile_options", None)
        return self
