"""What every command says where a model cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ..errors import CheckpointError, EarlyExitError, UsageError
from ..modeling.configuration import EarlyExitConfig
from ..modeling.loading import INPUT_PARTS, check_config_file, check_input_parts, has_input_part
from ..modeling.operating import OperatingPoints
from .arguments import AUTO


def load_model(name: Any, device: str = "cpu") -> Any:
    """A classifier with exits, from a folder or the Hub, in eval mode.

    Args:
        name: folder or Hub id.
        device: as in `on_device`.

    Raises:
        CheckpointError: if it is damaged.
        UsageError: if it has no exits, or is no classifier.
    """
    model = _load(AutoModelForSequenceClassification, name, f"run `hf-earlyexit train --model {name}` first")
    return on_device(model.eval(), device)


def load_captioner(name: Any, device: str = "cpu") -> Any:
    """A captioner with exits; otherwise as `load_model`."""
    remedy = "load it as EarlyExitVisionEncoderDecoder and train its exits first"
    return on_device(_load(AutoModelForImageTextToText, name, remedy).eval(), device)


def on_device(model: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """The model moved to a device.

    Args:
        model: any.
        device: its name; "auto" is the first GPU of CUDA where there is one, and the CPU otherwise.
        dtype: to cast the model to.

    Raises:
        UsageError: for a device that is not here.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == AUTO else device
    try:
        return model.to(chosen, dtype)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # torch says both of devices it has not
        first = str(error).split("\n")[0]
        raise UsageError(
            f"device is {device!r}, which cannot be used here: {first} `hf-earlyexit env` lists the devices.",
            field="device",
            value=device,
        ) from error


def load_any(name: Any) -> Any:
    """Whatever model with exits it is; otherwise as `load_model`."""
    return _load(AutoModel, name, "train its exits first")


def load_input_parts(name: Any) -> dict[str, Any]:
    """A captioner's tokenizer and image processor, by name.

    Raises:
        CheckpointError: if one is missing or damaged.
    """
    check_input_parts(name, {})
    return {part: _load_part(part, name) for part in INPUT_PARTS}


def load_parts_there(folder: Path) -> dict[str, Any]:
    """What a folder holds of tokenizer and image processor, by name; otherwise `None`.

    Raises:
        CheckpointError: if one is damaged.
    """
    return {part: _load_part(part, folder) if has_input_part(folder, part) else None for part in INPUT_PARTS}


def _load_part(part: str, name: Any) -> Any:
    auto = AutoTokenizer if part == "tokenizer" else AutoImageProcessor
    try:
        return auto.from_pretrained(name)
    except ValueError as error:
        raise CheckpointError(f"{name}: the {part.replace('_', ' ')} cannot be loaded: {error}", path=name) from error


def _load(auto: Any, name: Any, remedy: str) -> Any:
    check_config_file(name)
    trust = {"trust_remote_code": False}  # never asks
    try:
        config = AutoConfig.from_pretrained(name, **trust)
        if isinstance(config, EarlyExitConfig) and auto.__name__ not in config.auto_models:
            raise UsageError(f"{name} is an {config.door}, which this command is not for.", field="model", value=config.door)
        model = auto.from_pretrained(name, **trust)
    except EarlyExitError:
        raise
    except ValueError as error:  # such as a model type that transformers does not know
        raise CheckpointError(f"{name} cannot be loaded: {error}", path=name) from error
    if not isinstance(model, OperatingPoints):
        raise UsageError(f"{name} is a {type(model).__name__}, which has no exits; {remedy}.", field="model")
    return model
