"""`patch()` / `unpatch()`: torchrl's own names stand for fastwm's classes."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType, ModuleType

from torchrl.envs.model_based.world_model_env import WorldModelEnv as _TorchRLWorldModelEnv
from torchrl.modules.tensordict_module.world_models import WorldModel as _TorchRLWorldModel
from torchrl.objectives.world_model_loss import WorldModelLoss as _TorchRLWorldModelLoss

from fastwm.env import WorldModelEnv
from fastwm.loss import WorldModelLoss
from fastwm.world_model import WorldModel

__all__ = ["TORCHRL_CLASSES", "patch", "unpatch"]

# Taken when fastwm is imported, and nothing but fastwm replaces them: always torchrl's own.
TORCHRL_CLASSES: Mapping[str, type] = MappingProxyType(
    {
        "WorldModel": _TorchRLWorldModel,
        "WorldModelEnv": _TorchRLWorldModelEnv,
        "WorldModelLoss": _TorchRLWorldModelLoss,
    }
)

_TO_OURS: dict[type, type] = {
    _TorchRLWorldModel: WorldModel,
    _TorchRLWorldModelEnv: WorldModelEnv,
    _TorchRLWorldModelLoss: WorldModelLoss,
}
_TO_TORCHRL = {ours: theirs for theirs, ours in _TO_OURS.items()}

_lock = threading.RLock()
_patched = False
_wanted = False  # by a call of patch() that no `with` has taken over
_blocks: set[object] = set()  # one token per `with` block entered and not left


def _replace(table: Mapping[type, type]) -> None:
    """Exchange classes wherever a module of torchrl holds one, under whatever name."""
    for module, name, cls in _held(table):
        setattr(module, name, table[cls])


def _held(table: Mapping[type, type]) -> Iterator[tuple[ModuleType, str, type]]:
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == "torchrl" and isinstance(module, ModuleType):
            # vars(), not getattr(): a lazy module must not load anything for this.
            for name, value in list(vars(module).items()):
                if isinstance(value, type) and value in table:
                    yield module, name, value


def _settle() -> None:
    """Bring torchrl's modules in line with what is wanted."""
    global _patched
    wanted = _wanted or bool(_blocks)
    if wanted:
        # Again and again: a module of torchrl may have been imported since, straight from a file.
        _replace(_TO_OURS)
    elif _patched:
        _replace(_TO_TORCHRL)
    _patched = wanted


class patch:
    """Put fastwm's ``WorldModel``, ``WorldModelEnv`` and ``WorldModelLoss`` in torchrl's place.

    After ``fastwm.patch()`` every module of torchrl that holds one of torchrl's three classes
    (``torchrl.modules``, ``torchrl.envs``, ``torchrl.objectives``, and the files where they are
    written) holds fastwm's, so that a script which knows nothing of fastwm runs on it. Call it to
    patch until :func:`unpatch`, or use it as a context manager to patch for a block.

    - Calling it again changes nothing. Blocks nest: the outermost one that is left puts torchrl's
      classes back, unless a plain ``patch()`` came before it.
    - What a script imported *before* stays as it was: a name bound by
      ``from torchrl.envs import WorldModelEnv`` is the script's own. Patch first, then import the
      script. Modules of torchrl that are imported while patched, and what scripts take from
      torchrl then, hold fastwm's classes; the modules get torchrl's back as well, the scripts
      keep theirs.
    - Objects keep their class: an existing torchrl object is not converted, and is no instance of
      what ``torchrl.modules.WorldModel`` names while patched (nor can it be pickled meanwhile;
      save its ``state_dict``, which fits both).
    - It is for this process; a spawned worker that imports torchrl by itself must patch as well.
      Objects of fastwm may be sent to workers: they are pickled under fastwm's names.

    Example:
        >>> import fastwm
        >>> import torchrl.envs
        >>> with fastwm.patch():
        ...     from torchrl.envs import WorldModelEnv
        >>> WorldModelEnv is fastwm.WorldModelEnv
        True
        >>> torchrl.envs.WorldModelEnv is fastwm.WorldModelEnv
        False
        >>> _ = fastwm.patch()
        >>> torchrl.envs.WorldModelEnv is fastwm.WorldModelEnv
        True
        >>> fastwm.unpatch()
        >>> torchrl.envs.WorldModelEnv.__module__
        'torchrl.envs.model_based.world_model_env'
    """

    def __init__(self) -> None:
        global _wanted
        with _lock:
            # A plain call and `with patch():` begin alike; __enter__ tells them apart.
            self._may_be_block = not _wanted
            self._tokens: list[object] = []
            _wanted = True
            _settle()

    def __enter__(self) -> patch:
        global _wanted
        with _lock:
            if self._may_be_block:
                self._may_be_block = _wanted = False
            self._tokens.append(object())
            _blocks.add(self._tokens[-1])
            _settle()
        return self

    def __exit__(self, *exc: object) -> None:
        with _lock:
            # unpatch() may have ended the block already.
            _blocks.discard(self._tokens.pop())
            _settle()


def unpatch() -> None:
    """Put torchrl's own classes back, wherever :class:`patch` replaced them.

    Does nothing when nothing is patched. Inside ``with fastwm.patch():`` it ends all open blocks.

    Example:
        >>> import fastwm
        >>> _ = fastwm.patch()
        >>> fastwm.unpatch()
        >>> fastwm.unpatch()
    """
    global _wanted
    with _lock:
        _wanted = False
        _blocks.clear()
        _settle()
