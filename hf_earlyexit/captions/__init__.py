"""Captioners: pictures in, sentences out, from the model to the page that shows where each word was decided."""

from ..lazy import lazy_names

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

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
