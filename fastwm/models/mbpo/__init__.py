"""MBPO and PETS: a probabilistic ensemble on observations.

The way of the data::

    ensemble      networks side by side, their elites, the inputs' normalizer
    dynamics      which member sends a row on, and what it draws; the rule for terminations
    builder       `mbpo`: all of it as a Family
    loss          `EnsembleLoss`: Gaussian likelihood; the ranking on held-out data
    fit           training until the held-out error no longer falls
    schedule      how far to imagine
    terminations  rules of MuJoCo tasks
"""

from fastwm.models.mbpo import terminations
from fastwm.models.mbpo.builder import mbpo
from fastwm.models.mbpo.dynamics import EnsembleDynamics
from fastwm.models.mbpo.ensemble import Ensemble
from fastwm.models.mbpo.fit import WEIGHT_DECAY, Fitted, fit, parameter_groups
from fastwm.models.mbpo.loss import EnsembleLoss
from fastwm.models.mbpo.schedule import rollout_length

__all__ = [
    "WEIGHT_DECAY",
    "Ensemble",
    "EnsembleDynamics",
    "EnsembleLoss",
    "Fitted",
    "fit",
    "mbpo",
    "parameter_groups",
    "rollout_length",
    "terminations",
]
