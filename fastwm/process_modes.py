"""What the process is set to: modes that a trace depends on, and modes that only eager code respects."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import composite_lp_aggregate
from tensordict.nn.probabilistic import interaction_type
from tensordict.nn.utils import skip_existing
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

__all__ = ["NotCapturable", "process_modes", "refuse_modes"]

_MODULE = torch.nn.modules.module


class NotCapturable(Exception):
    """This call is the eager path's; the message names the one thing that ruled a trace out."""


def process_modes() -> tuple[Any, ...]:
    """What traced code may ask for: equal for two calls that find the process alike."""
    return (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), interaction_type(),
        torch.get_default_dtype(), torch._C._len_torch_function_stack() and torch.get_default_device(),
        torch.distributions.Distribution._validate_args, skip_existing(),
        composite_lp_aggregate(nowarn=True),
    )  # fmt: skip


def refuse_modes(device: str) -> None:
    """Raise :class:`NotCapturable` for a mode that a trace would miss.

    Args:
        device: the type of device whose autocast counts, beside the CPU's.
    """
    if torch.is_autocast_enabled("cpu") or (device != "cpu" and torch.is_autocast_enabled(device)):
        raise NotCapturable("autocast is on")
    if torch.compiler.is_compiling():
        raise NotCapturable("inside torch.compile")
    if torch._C._is_tracing():
        raise NotCapturable("inside torch.jit.trace")
    modes = torch._C._len_torch_function_stack() and any(
        type(mode) is not DeviceContext for mode in _get_current_function_mode_stack()
    )  # a default device is one, and known to the plan
    if torch._C._len_torch_dispatch_stack() or modes:
        raise NotCapturable("a torch dispatch or function mode is active")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotCapturable("inside a torch.func transform")
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotCapturable("forward-mode AD is on")
    if (
        _MODULE._global_forward_hooks
        or _MODULE._global_forward_pre_hooks
        or _MODULE._global_backward_hooks
        or _MODULE._global_backward_pre_hooks
    ):
        raise NotCapturable("global module hooks")
