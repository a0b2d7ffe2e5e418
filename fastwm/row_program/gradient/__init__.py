"""Reverse-mode differentiation of row programs: the backward pass is a row program too.

- ``build``: walks the forward program backwards and puts the two programs together.
- ``rules``: one rule per op: what its operands get from the gradient of its result.
- ``activity``: which values get a gradient at all.
- ``tape``: which forward values are saved, and which the backward program works out again.
"""

from fastwm.row_program.gradient.build import Gradient, Source, differentiate

__all__ = ["Gradient", "Source", "differentiate"]
