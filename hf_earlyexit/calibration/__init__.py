"""Choosing thresholds: targets, exact search, results. Imports no model and no transformers."""

from .captions import CaptionCalibrationResult, CaptionSetting
from .choose import calibrate
from .replay import ExitReport, Replay, replay
from .result import CalibrationResult
from .targets import TARGETS, FinalLayerError, LayerBudget, MaxDrop, SpeedUp, Target, parse_target

__all__ = [
    "TARGETS",
    "CalibrationResult",
    "CaptionCalibrationResult",
    "CaptionSetting",
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
