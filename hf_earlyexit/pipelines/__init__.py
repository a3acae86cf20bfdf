"""Pipelines for text classification, image classification and captioning, with the layers that answers came from."""

from .build import pipeline
from .captioning import EarlyExitCaptioningPipeline
from .pictures import EarlyExitImageClassificationPipeline
from .texts import EarlyExitTextClassificationPipeline

__all__ = [
    "EarlyExitCaptioningPipeline",
    "EarlyExitImageClassificationPipeline",
    "EarlyExitTextClassificationPipeline",
    "pipeline",
]
