"""Why a step does not become a row program."""

from __future__ import annotations

__all__ = ["Misfit", "NotLowerable", "RowsMix"]


class NotLowerable(Exception):
    """The step has no row program; the message names the one op, dtype or shape that ruled it out."""


class Misfit(NotLowerable):
    """Layouts that do not fit together. Noise whose batch lies elsewhere might yet make them fit."""


class RowsMix(Misfit):
    """An op makes one row of the batch depend on another, as far as the layout of its operands tells."""
