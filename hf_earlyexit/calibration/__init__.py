"""Choosing thresholds: targets, exact search, results. Imports no model and no transformers."""

from .choose import calibrate
from .result import CalibrationResult, ExitReport
from .targets import TARGETS, FinalLayerError, LayerBudget, MaxDrop, SpeedUp, Target, parse_target

__all__ = [
    "TARGETS",
    "CalibrationResult",
    "ExitReport",
    "FinalLayerError",
    "LayerBudget",
    "MaxDrop",
    "SpeedUp",
    "Target",
    "calibrate",
    "parse_target",
]
