"""fastwm: TorchRL's world-model API at the speed of the machine."""

from fastwm import _requirements, planning  # noqa: F401 (the first names what is missing)
from fastwm.acceleration import accelerate
from fastwm.backends import backend
from fastwm.backends import requested as requested_backend
from fastwm.env import WorldModelEnv
from fastwm.explain import Explanation
from fastwm.imagination import imagine
from fastwm.loss import WorldModelLoss
from fastwm.ops import balanced_kl, gae, gaussian_nll, lambda_return, two_hot_cross_entropy
from fastwm.parity import ParityReport, check_parity
from fastwm.patching import patch, unpatch
from fastwm.world_model import WorldModel

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "ParityReport",
    "WorldModel",
    "WorldModelEnv",
    "WorldModelLoss",
    "accelerate",
    "backend",
    "balanced_kl",
    "check_parity",
    "gae",
    "gaussian_nll",
    "imagine",
    "lambda_return",
    "patch",
    "planning",
    "requested_backend",
    "two_hot_cross_entropy",
    "unpatch",
]
