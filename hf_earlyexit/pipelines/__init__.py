"""Pipelines for classification of texts and images, text generation and captioning: with the layers answers came from."""

from .build import pipeline
from .captioning import EarlyExitCaptioningPipeline
from .pictures import EarlyExitImageClassificationPipeline
from .texts import EarlyExitTextClassificationPipeline
from .writing import EarlyExitTextGenerationPipeline

__all__ = [
    "EarlyExitCaptioningPipeline",
    "EarlyExitImageClassificationPipeline",
    "EarlyExitTextClassificationPipeline",
    "EarlyExitTextGenerationPipeline",
    "pipeline",
]
