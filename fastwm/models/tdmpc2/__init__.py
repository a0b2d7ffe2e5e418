"""TD-MPC2: builder, losses and networks.

Source: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous Control", ICLR 2024,
arXiv:2310.16828; the official repository, nicklashansen/tdmpc2.
"""

from fastwm.models.tdmpc2.builder import SIZES, tdmpc2
from fastwm.models.tdmpc2.discount import discount_of
from fastwm.models.tdmpc2.loss import TDMPC2Loss
from fastwm.models.tdmpc2.networks import (
    PixelEncoder,
    PolicyPrior,
    PolicySample,
    QEnsemble,
    QValues,
    TaskEmbedding,
)
from fastwm.models.tdmpc2.scale import RunningScale

__all__ = [
    "SIZES",
    "PixelEncoder",
    "PolicyPrior",
    "PolicySample",
    "QEnsemble",
    "QValues",
    "RunningScale",
    "TDMPC2Loss",
    "TaskEmbedding",
    "discount_of",
    "tdmpc2",
]
