"""The suites by their former name: see :mod:`fastwm.bench.suites`."""

from fastwm.bench.suites import SUITES, MLPWorldModel, Model, Suite, suite

__all__ = ["SUITES", "MLPWorldModel", "Model", "Suite", "suite"]
