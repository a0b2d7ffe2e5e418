"""Planners over imagined envs: TensorDict modules that read a state and write the best action found."""

from fastwm.planning.base import Planner
from fastwm.planning.cem import CEMPlanner
from fastwm.planning.icem import ICEMPlanner
from fastwm.planning.mppi import MPPIPlanner
from fastwm.planning.tdmpc2 import TDMPC2Planner

__all__ = ["CEMPlanner", "ICEMPlanner", "MPPIPlanner", "Planner", "TDMPC2Planner"]
