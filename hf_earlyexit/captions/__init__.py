"""Captioners: pictures in, sentences out, from the model to the page that shows where each word was decided."""

from ..lazy import lazy_names

_HOMES = {
    "CaptionRows": "data",
    "CaptionCollator": "data",
    "EarlyExitCaptioningTrainer": "trainer",
    "caption_page": "page",
}

__all__ = [
    "CaptionCollator",
    "CaptionRows",
    "EarlyExitCaptioningTrainer",
    "caption_page",
]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
