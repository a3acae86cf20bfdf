"""Text written token by token: each token leaves the decoder where it is decided."""

from ..lazy import lazy_names

_HOMES = {
    "calibrate_generation": "calibrate",
    "read_prompts": "prompts",
    "write_samples": "samples",
    "calibrate_drafts": "draft_calibration",
    "DraftCalibration": "draft_calibration",
}

__all__ = ["DraftCalibration", "calibrate_drafts", "calibrate_generation", "read_prompts", "write_samples"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
