"""Choosing thresholds: targets, exact search, results. Imports no model and no transformers."""

from .choose import calibrate
from .replay import ExitReport, Replay, replay
from .result import CalibrationResult
from .targets import TARGETS, FinalLayerError, LayerBudget, MaxDrop, SpeedUp, Target, parse_target

__all__ = [
    "TARGETS",
    "CalibrationResult",
    "ExitReport",
    "FinalLayerError",
    "LayerBudget",
    "MaxDrop",
    "Replay",
    "SpeedUp",
    "Target",
    "calibrate",
    "parse_target",
    "replay",
]
