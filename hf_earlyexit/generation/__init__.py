"""Text written token by token: each token leaves the decoder where it is decided."""

from typing import Any

from ..lazy import load

_HOMES = {
    "write_samples": "samples",
    "calibrate_drafts": "draft_calibration",
    "DraftCalibration": "draft_calibration",
}

__all__ = ["DraftCalibration", "calibrate_drafts", "write_samples"]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
