"""`WorldModel`: encoder, dynamics and heads composed into one TensorDict module."""

from __future__ import annotations

from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential

__all__ = ["WorldModel"]


class WorldModel(TensorDictModuleBase):
    """Encoder, dynamics, reward head and, optionally, done head and decoder, as one module.

    A drop-in for ``torchrl.modules.WorldModel``: the same arguments, keys and ``state_dict`` names,
    so that checkpoints move both ways. The parts talk through the keys they declare; no latent,
    observation or architecture is assumed. Roll it out with :class:`fastwm.WorldModelEnv`.

    Args:
        encoder: observation to latent, e.g. ``observation -> latent``; shapes ``[*B, O] -> [*B, Z]``.
        dynamics: one step of the latent, e.g. ``(latent, action) -> ("next", latent)``;
            shapes ``[*B, Z], [*B, A] -> [*B, Z]``.
        reward_head: e.g. ``("next", latent) -> ("next", "reward")``; shapes ``[*B, Z] -> [*B, 1]``.

    Keyword Args:
        done_head: e.g. ``("next", latent) -> ("next", "done")`` (or ``"terminated"``, ``"truncated"``).
            What it emits may be bool, integer or float; :class:`fastwm.WorldModelEnv` turns it to bool.
        decoder: latent to observation. :meth:`decode` needs it.

    The parts are composed when the object is built. To exchange a part later, exchange what is inside
    it (``world_model.dynamics.module = ...``) or build a new ``WorldModel``.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> from torchrl.modules import MLP
        >>> import fastwm
        >>> world_model = fastwm.WorldModel(
        ...     Mod(torch.nn.Linear(8, 4), in_keys=["observation"], out_keys=["latent"]),
        ...     Mod(MLP(6, 4, num_cells=[]), in_keys=["latent", "action"], out_keys=[("next", "latent")]),
        ...     Mod(torch.nn.Linear(4, 1), in_keys=[("next", "latent")], out_keys=[("next", "reward")]),
        ... )
        >>> td = TensorDict({"observation": torch.randn(2, 8), "action": torch.randn(2, 2)}, [2])
        >>> world_model(td)["next", "reward"].shape
        torch.Size([2, 1])
        >>> world_model.in_keys
        ['observation', 'action']
    """

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        dynamics: TensorDictModuleBase,
        reward_head: TensorDictModuleBase,
        *,
        done_head: TensorDictModuleBase | None = None,
        decoder: TensorDictModuleBase | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.dynamics = dynamics
        self.reward_head = reward_head
        self.done_head = done_head
        self.decoder = decoder

        step = [m for m in (dynamics, reward_head, done_head, decoder) if m is not None]
        # Both names are part of upstream's state_dict.
        self._full_seq = TensorDictSequential(encoder, *step)
        self._step_seq = TensorDictSequential(*step)
        self.in_keys = self._full_seq.in_keys
        self.out_keys = self._full_seq.out_keys

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Encoder, then one step: ``encoder -> dynamics -> reward_head [-> done_head] [-> decoder]``.

        Args:
            tensordict: batch ``[*B]`` with every key of :attr:`in_keys`.

        Returns:
            The same tensordict with every key of :attr:`out_keys` written.
        """
        return self._full_seq(tensordict)

    def encode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the latent of an observation: the encoder alone."""
        return self.encoder(tensordict)

    def step(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One imagined step from a latent: ``dynamics -> reward_head [-> done_head] [-> decoder]``.

        Does not encode: the tensordict must hold the current latent and the action.
        """
        return self._step_seq(tensordict)

    def decode(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the observation of a latent: the decoder alone.

        Raises:
            RuntimeError: there is no decoder.
        """
        if self.decoder is None:
            raise RuntimeError(
                "WorldModel.decode requires a decoder module. Pass decoder= at construction."
            )
        return self.decoder(tensordict)

    @property
    def step_module(self) -> TensorDictSequential:
        """The step alone (dynamics and heads, no encoder), as :class:`WorldModelEnv` drives it."""
        return self._step_seq
