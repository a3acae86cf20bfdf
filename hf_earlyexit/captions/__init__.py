"""Captioners: pictures in, sentences out, from the model to the page that shows where each word was decided."""

from typing import Any

from ..lazy import load

_HOMES = {
    "CaptionRows": "data",
    "CaptionCollator": "data",
    "EarlyExitCaptioningTrainer": "trainer",
    "calibrate_captions": "calibrate",
    "CaptionCalibrationResult": "result",
    "caption_page": "page",
}

__all__ = [
    "CaptionCalibrationResult",
    "CaptionCollator",
    "CaptionRows",
    "EarlyExitCaptioningTrainer",
    "calibrate_captions",
    "caption_page",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
