"""Model families of the field, each built as a :class:`fastwm.WorldModel` with what it trains and acts with.

A family is one file here and one line below. It knows no engine: what makes it fast is
:class:`fastwm.WorldModelEnv`.
"""

from fastwm.models.family import Family
from fastwm.models.tdmpc2 import tdmpc2

__all__ = ["Family", "tdmpc2"]
