"""Training objectives over all exits: one file each, known by name."""

from .base import OBJECTIVES, Objective, ObjectiveValue, task_loss
from .consistentee import ESTIMATORS, ConsistentObjective
from .distillation import DistillationObjective
from .two_stage import TwoStageObjective
from .weighted import WeightedObjective

__all__ = [
    "ESTIMATORS",
    "OBJECTIVES",
    "ConsistentObjective",
    "DistillationObjective",
    "Objective",
    "ObjectiveValue",
    "TwoStageObjective",
    "WeightedObjective",
    "task_loss",
]
