"""The named classes: one config and one model per family and task."""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BertForSequenceClassification

from .captions.configuration import EarlyExitVisionEncoderDecoderConfig
from .captions.model import EarlyExitVisionEncoderDecoder
from .captions.processor import EarlyExitCaptionProcessor
from .families import FAMILIES
from .modeling.classifier import EarlyExitClassifier
from .modeling.configuration import EarlyExitBertConfig

CAPTIONING = "early-exit-captioning"


class EarlyExitBertForSequenceClassification(EarlyExitClassifier, BertForSequenceClassification):
    """`BertForSequenceClassification` with exits.

    Loads any plain BERT checkpoint (bare, masked language model or classifier) and keeps its final answers to the bit;
    the stock class reads the folders it saves and gives the full model's answers.

    Example:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitBertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> ee.EarlyExitBertForSequenceClassification(config).exit_layers
        (1, 2, 3, 4)
    """

    config_class = EarlyExitBertConfig
    config: EarlyExitBertConfig
    family = FAMILIES["bert"]


def register_auto_classes() -> None:
    """Make the Auto classes know the doors; harmless when repeated."""
    for model in (EarlyExitBertForSequenceClassification, EarlyExitVisionEncoderDecoder):
        config = model.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for name in config.auto_models:
            getattr(transformers, name).register(config, model, exist_ok=True)
    AutoProcessor.register(EarlyExitVisionEncoderDecoderConfig, EarlyExitCaptionProcessor, exist_ok=True)


def register_pipelines() -> None:
    """Make `transformers.pipeline` know the task of captioners; the pipeline itself is loaded by who asks for it."""
    from transformers.pipelines import PIPELINE_REGISTRY  # brings all of transformers' pipelines with it

    PIPELINE_REGISTRY.supported_tasks[CAPTIONING] = {
        "impl": "hf_earlyexit.pipelines.EarlyExitCaptioningPipeline",
        "pt": (AutoModelForImageTextToText,),
        "type": "image",
    }
