"""Early exiting for Hugging Face transformers: rows leave the network at the layer where they are decided.

Importing the package makes transformers know its models and its pipeline, warns of a transformers newer than any that was
tested, and does nothing else. The models are made known when the part of transformers that has to know is loaded, before or
after; every other name is loaded when it is first used.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from .after_import import after_import
from .versions import warn_if_untested

__version__ = version("hf_earlyexit")

_HOMES = {
    "from_pretrained": "doors",
    "EarlyExitVisionEncoderDecoder": "doors",
    "EarlyExitVisionEncoderDecoderConfig": "doors",
    "EarlyExitCaptionProcessor": "doors",
    "EarlyExitTrainer": "training.trainer",
    "EarlyExitTrainingArguments": "training.arguments",
    "ConsistentTrainer": "training.consistent",
    "ConsistentTrainingArguments": "training.consistent_arguments",
    "ExitTrace": "trace",
    "collect_trace": "serving.collect",
    "calibrate": "calibration.choose",
    "replay": "calibration.replay",
    "Certified": "calibration.certify",
    "FinalLayerError": "calibration.targets",
    "LayerBudget": "calibration.targets",
    "MaxDrop": "calibration.targets",
    "SpeedUp": "calibration.targets",
    "BeemPolicy": "policies.beem",
    "ConfidencePolicy": "policies.confidence",
    "check_exit_policy": "walking.laws",
    "predict": "serving.predict",
    "stream": "serving.predict",
    "explain": "serving.explain",
    "pipeline": "pipelines",
    "Engine": "serving.online",
    "Monitor": "serving.monitor",
    "quantize_int8": "serving.int8",
    "convert": "forms.convert",
    "keep_thresholds": "forms.convert",
    "export_onnx": "onnx.export",
    "OnnxClassifier": "onnx.classifier",
    "save": "hub.save",
    "push_to_hub": "hub.push",
    "EarlyExitError": "errors",
}
"""What everyday use needs; the rest is in the rooms, such as `hf_earlyexit.policies.PatiencePolicy`."""

ROOMS = ("calibration", "captions", "errors", "evaluation", "generation", "hub", "losses", "measuring", "policies",
         "reports", "signals", "training")  # fmt: skip

__all__ = ["__version__", *_HOMES]

warn_if_untested()


def _register(name: str) -> None:
    getattr(import_module(".doors", __name__), name)()


after_import("transformers.models.auto.configuration_auto", lambda: _register("register_auto_classes"))
after_import("transformers.models.auto.processing_auto", lambda: _register("register_processors"))
after_import("transformers.pipelines", lambda: _register("register_pipelines"))


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return import_module(f".{name}", __name__)
    if name == "ray":
        return import_module(".scale.ray", __name__)
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
    return sorted({*__all__, *ROOMS, *import_module(".doors", __name__).door_names()})
