"""Choosing thresholds: targets, exact search, results. Imports no model and no transformers."""

from .certify import Certified
from .choose import calibrate
from .cross_fit import Expectation
from .generation import GenerationCalibrationResult, GenerationSetting
from .promise import Promise
from .quality import METRICS, Metric
from .replay import ExitReport, Replay, replay
from .result import CalibrationResult
from .targets import TARGETS, FinalLayerError, LayerBudget, MaxDrop, SpeedUp, Target, parse_target

__all__ = [
    "METRICS",
    "TARGETS",
    "CalibrationResult",
    "Certified",
    "ExitReport",
    "Expectation",
    "FinalLayerError",
    "GenerationCalibrationResult",
    "GenerationSetting",
    "LayerBudget",
    "MaxDrop",
    "Metric",
    "Promise",
    "Replay",
    "SpeedUp",
    "Target",
    "calibrate",
    "parse_target",
    "replay",
]
