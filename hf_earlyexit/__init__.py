"""Early exiting for Hugging Face transformers: rows leave the network at the layer where they are decided.

Importing the package makes transformers know its models and its pipeline, warns of a transformers newer than any that was
tested, and does nothing else. The models are made known when the part of transformers that has to know is loaded, before or
after; every other name is loaded when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .after_import import after_import
from .tested import warn_if_untested

__version__ = version("hf_earlyexit")

_HOMES = {
    "from_pretrained": "doors",
    "EarlyExitVisionEncoderDecoder": "doors",
    "EarlyExitVisionEncoderDecoderConfig": "doors",
    "EarlyExitCaptionProcessor": "doors",
    "EarlyExitTrainer": "training.trainer",
    "EarlyExitTrainingArguments": "training.arguments",
    "EarlyExitCaptioningTrainer": "captions.trainer",
    "EarlyExitLanguageModelTrainer": "training.language_model",
    "TokenCollator": "training.language_model",
    "pack_texts": "training.language_model",
    "write_samples": "generation.samples",
    "calibrate_drafts": "generation.draft_calibration",
    "DraftCalibration": "generation.draft_calibration",
    "CaptionCollator": "captions.data",
    "CaptionRows": "captions.data",
    "ConsistentTrainer": "training.consistent",
    "ConsistentTrainingArguments": "training.consistent_arguments",
    "HardnessTable": "training.hardness",
    "ExitTrace": "trace",
    "collect_trace": "serving.collect",
    "calibrate": "calibration.choose",
    "calibrate_captions": "captions.calibrate",
    "replay": "calibration.replay",
    "CalibrationResult": "calibration.result",
    "CaptionCalibrationResult": "captions.result",
    "Certified": "calibration.certify",
    "FinalLayerError": "calibration.targets",
    "LayerBudget": "calibration.targets",
    "MaxDrop": "calibration.targets",
    "SpeedUp": "calibration.targets",
    "ExitPolicy": "policies.base",
    "ExitSignal": "signals.base",
    "register_signal": "signals.base",
    "register_policy": "policies.base",
    "ConfidencePolicy": "policies.confidence",
    "EntropyPolicy": "policies.confidence",
    "MarginPolicy": "policies.confidence",
    "PatiencePolicy": "policies.patience",
    "BeemPolicy": "policies.beem",
    "GatePolicy": "policies.gate",
    "SaturationPolicy": "policies.saturation",
    "StaticPolicy": "policies.static",
    "check_exit_policy": "walking.laws",
    "pipeline": "pipelines",
    "save": "hub.save",
    "push_to_hub": "hub.push",
    "card_figures": "hub.figures",
    "predict": "serving.predict",
    "stream": "serving.predict",
    "Engine": "serving.online",
    "Monitor": "serving.monitor",
    "quantize_int8": "serving.int8",
    "export_onnx": "onnx.export",
    "OnnxClassifier": "onnx.classifier",
    "explain": "serving.explain",
    "write_report": "reports.write",
    "caption_page": "captions.page",
    "EarlyExitMetric": "evaluation",
    "EarlyExitError": "errors",
}

__all__ = ["__version__", *_HOMES]

warn_if_untested()


def _register(name: str) -> None:
    getattr(import_module(".doors", __name__), name)()


after_import("transformers.models.auto.configuration_auto", lambda: _register("register_auto_classes"))
after_import("transformers.models.auto.processing_auto", lambda: _register("register_processors"))
after_import("transformers.pipelines", lambda: _register("register_pipelines"))


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name, "doors" if name.startswith("EarlyExit") else None)  # doors of all families are made there
    try:
        return getattr(import_module(f".{home}", __name__), name) if home else _missing(name)
    except AttributeError:
        if name in _HOMES:
            raise
        return _missing(name)


def _missing(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*__all__, *import_module(".doors", __name__).door_names()})
