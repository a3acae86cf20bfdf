"""Early exiting for Hugging Face transformers: rows leave the network at the layer where they are decided.

Importing the package makes transformers know its models and its pipeline and does nothing else; every other name is loaded
when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .modeling.doors import register_auto_classes, register_pipelines

__version__ = version("hf_earlyexit")

_HOMES = {
    "EarlyExitBertConfig": "modeling.configuration",
    "EarlyExitBertForSequenceClassification": "modeling.doors",
    "EarlyExitVisionEncoderDecoder": "modeling.encoder_decoder",
    "EarlyExitVisionEncoderDecoderConfig": "modeling.captioner_configuration",
    "EarlyExitCaptionProcessor": "modeling.caption_processor",
    "EarlyExitTrainer": "training.trainer",
    "EarlyExitTrainingArguments": "training.arguments",
    "EarlyExitCaptioningTrainer": "training.captioning",
    "CaptionCollator": "training.caption_data",
    "CaptionRows": "training.caption_data",
    "ConsistentTrainer": "training.consistent",
    "ConsistentTrainingArguments": "training.consistent_arguments",
    "HardnessTable": "training.hardness",
    "ExitTrace": "trace",
    "collect_trace": "inference.collect",
    "calibrate": "calibration.choose",
    "calibrate_captions": "inference.calibrate_captions",
    "replay": "calibration.replay",
    "CalibrationResult": "calibration.result",
    "CaptionCalibrationResult": "calibration.captions",
    "FinalLayerError": "calibration.targets",
    "LayerBudget": "calibration.targets",
    "MaxDrop": "calibration.targets",
    "SpeedUp": "calibration.targets",
    "ExitPolicy": "policies.base",
    "ExitSignal": "policies.base",
    "register_policy": "policies.base",
    "ConfidencePolicy": "policies.confidence",
    "EntropyPolicy": "policies.confidence",
    "MarginPolicy": "policies.confidence",
    "PatiencePolicy": "policies.patience",
    "BeemPolicy": "policies.beem",
    "GatePolicy": "policies.gate",
    "SaturationPolicy": "policies.saturation",
    "StaticPolicy": "policies.static",
    "check_exit_policy": "policies.laws",
    "pipeline": "pipelines",
    "save": "hub.save",
    "push_to_hub": "hub.push",
    "card_figures": "hub.figures",
    "predict": "inference.predict",
    "stream": "inference.predict",
    "quantize_int8": "inference.quantize",
    "export_onnx": "onnx.export",
    "OnnxClassifier": "onnx.classifier",
    "explain": "inference.explain",
    "write_report": "reports.write",
    "caption_page": "reports.captions",
    "EarlyExitMetric": "evaluation",
    "EarlyExitError": "errors",
}

__all__ = ["__version__", *_HOMES]

register_auto_classes()
register_pipelines()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
