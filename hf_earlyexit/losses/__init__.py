"""Training objectives over all exits: one file each, known by name."""

from .base import OBJECTIVES, Objective, ObjectiveValue, Progress, task_loss
from .consistentee import ESTIMATORS, ConsistentObjective
from .distillation import DistillationObjective
from .layerskip import LayerSkipObjective
from .two_stage import TwoStageObjective
from .weighted import WeightedObjective

__all__ = [
    "ESTIMATORS",
    "OBJECTIVES",
    "ConsistentObjective",
    "DistillationObjective",
    "LayerSkipObjective",
    "Objective",
    "ObjectiveValue",
    "Progress",
    "TwoStageObjective",
    "WeightedObjective",
    "task_loss",
]
