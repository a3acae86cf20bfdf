"""Early exiting for Hugging Face transformers: rows leave the network at the layer where they are decided.

Importing the package registers its models with the Auto classes and does nothing else; every other name is loaded when it
is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .modeling.doors import register_auto_classes

__version__ = version("hf_earlyexit")

_HOMES = {
    "EarlyExitBertConfig": "modeling.configuration",
    "EarlyExitBertForSequenceClassification": "modeling.doors",
    "EarlyExitVisionEncoderDecoder": "modeling.encoder_decoder",
    "EarlyExitVisionEncoderDecoderConfig": "modeling.captioner_configuration",
    "EarlyExitTrainer": "training.trainer",
    "EarlyExitTrainingArguments": "training.arguments",
    "ConsistentTrainer": "training.consistent",
    "ConsistentTrainingArguments": "training.consistent_arguments",
    "HardnessTable": "training.hardness",
    "ExitTrace": "trace",
    "collect_trace": "inference.collect",
    "calibrate": "calibration.choose",
    "replay": "calibration.replay",
    "CalibrationResult": "calibration.result",
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
    "predict": "inference.predict",
    "stream": "inference.predict",
    "quantize_int8": "inference.quantize",
    "export_onnx": "onnx.export",
    "OnnxClassifier": "onnx.classifier",
    "explain": "inference.explain",
    "write_report": "reports.write",
    "EarlyExitMetric": "evaluation",
    "EarlyExitError": "errors",
}

__all__ = ["__version__", *_HOMES]

register_auto_classes()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
