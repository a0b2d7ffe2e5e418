"""fastwm: TorchRL's world-model API at the speed of the machine."""

from fastwm.backends import backend
from fastwm.backends import requested as requested_backend
from fastwm.env import WorldModelEnv
from fastwm.world_model import WorldModel

__version__ = "0.1.0"
__all__ = ["WorldModel", "WorldModelEnv", "backend", "requested_backend"]
