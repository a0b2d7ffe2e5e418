"""Model families of the field, each built as a :class:`fastwm.WorldModel` with what it trains and acts with.

A family is one file here and one line below. It knows no engine: what makes it fast is
:class:`fastwm.WorldModelEnv`.
"""

from fastwm.models.family import Family
from fastwm.models.mbpo import mbpo
from fastwm.models.rssm.categorical_loss import DreamerV3ModelLoss
from fastwm.models.rssm.dreamer_v1 import dreamer_v1
from fastwm.models.rssm.dreamer_v2 import dreamer_v2
from fastwm.models.rssm.dreamer_v3 import dreamer_v3
from fastwm.models.rssm.family import RSSMFamily
from fastwm.models.rssm.filter import RSSMFilter
from fastwm.models.rssm.loss import DreamerModelLoss
from fastwm.models.rssm.planet import planet
from fastwm.models.rssm.posterior import RSSMRollout
from fastwm.models.rssm.rows import insert_resets
from fastwm.models.tdmpc2 import tdmpc2

__all__ = [
    "DreamerModelLoss",
    "DreamerV3ModelLoss",
    "Family",
    "RSSMFamily",
    "RSSMFilter",
    "RSSMRollout",
    "dreamer_v1",
    "dreamer_v2",
    "dreamer_v3",
    "insert_resets",
    "mbpo",
    "planet",
    "tdmpc2",
]
