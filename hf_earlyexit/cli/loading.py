"""What every command says where a model cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from ..errors import CheckpointError, EarlyExitError, UsageError
from ..modeling.configuration import EarlyExitConfig
from ..modeling.loading import INPUT_PARTS, check_input_parts, check_named_checkpoint, has_input_part
from ..modeling.operating import OperatingPoints
from ..modeling.protocol import ExitClassifier, ExitModel, TorchExitWriter
from ..serving.reader import reads_images
from ..serving.served import form_of
from .arguments import AUTO, FormArguments

CLASSIFIERS = (AutoModelForSequenceClassification, AutoModelForImageClassification)


def load_model(name: Any, device: str = "cpu") -> Any:
    """A classifier with exits, from a folder or the Hub, in eval mode.

    Args:
        name: folder or Hub id.
        device: as in `on_device`.

    Raises:
        CheckpointError: if it is damaged.
        UsageError: if it has no exits, or is no classifier.
    """
    model = _load(CLASSIFIERS, name, f"run `hf-earlyexit train --model {name}` first")
    return on_device(model.eval(), device)


def load_model_or_writer(name: Any, device: str = "cpu") -> Any:
    """A classifier, captioner or language model with exits; otherwise as `load_model`."""
    autos = (*CLASSIFIERS, AutoModelForCausalLM, AutoModelForImageTextToText)
    return on_device(_load(autos, name, f"run `hf-earlyexit train --model {name}` first").eval(), device)


def load_language_model(name: Any, device: str = "cpu") -> Any:
    """A language model with exits; otherwise as `load_model`."""
    remedy = "load it with ee.from_pretrained(..., task='text-generation') and train its exits first"
    return on_device(_load((AutoModelForCausalLM,), name, remedy).eval(), device)


def drafting_point(args: Any, model: TorchExitWriter) -> str | None:
    """The operating point to write with: that which drafts were chosen for, where they are asked for and no other is named.

    Args:
        args: flags of the command.
        model: that has been loaded.

    Raises:
        UsageError: for drafts where no policy makes any.
    """
    point: str | None = model.point_of(args.operating_point, args.lossless and args.early_exit is not False)
    if args.lossless and args.early_exit is not False and model.policy_at(point) is None:
        raise UsageError(
            f"--lossless, but no policy of {args.model} makes drafts; run `hf-earlyexit calibrate` with it first.",
            field="lossless",
        )
    return point


def load_exported_or_model(name: Any, device: str = "cpu") -> Any:
    """As `load_model`, or what runs a folder of ONNX files.

    Raises:
        UsageError: for another device than the CPU with ONNX files.
    """
    from ..onnx.manifest import MANIFEST

    if not (Path(name) / MANIFEST).is_file():
        return load_model(name, device)
    from ..onnx.classifier import OnnxClassifier

    if device not in (AUTO, "cpu"):
        raise UsageError(f"device is {device!r}, but ONNX files are run on the CPU; leave it out.", field="device")
    return OnnxClassifier.from_pretrained(name)


def in_form(model: ExitClassifier, args: FormArguments) -> Any:
    """A model in the form that the flags ask for, with the thresholds that its folder keeps for it.

    Raises:
        UsageError, UnknownNameError, CheckpointError: as `convert`.
    """
    if args.form is None:
        return model
    if form_of(model).startswith("onnx"):
        if args.form not in (AUTO, form_of(model)):
            raise UsageError(
                f"form is {args.form!r}, and the folder holds ONNX files of the form {form_of(model)!r}; leave it out, or "
                "name the folder of the model itself.",
                field="form",
                value=args.form,
            )
        return model
    from ..forms.convert import convert

    return convert(model, args.form, performance_hint=args.performance_hint)


def reading_parts(name: Any, model: ExitModel) -> dict[str, Any]:
    """What makes a classifier's inputs, by the name of the argument that takes it: its tokenizer or its image processor.

    Args:
        name: folder or Hub id that holds it.
        model: which reads texts or pictures.

    Raises:
        CheckpointError: if an image processor is missing or damaged.
    """
    if not reads_images(model):
        return {"tokenizer": AutoTokenizer.from_pretrained(name)}
    check_input_parts(name, {}, ("image_processor",))
    return {"image_processor": _load_part("image_processor", name)}


def load_captioner(name: Any, device: str = "cpu") -> Any:
    """A captioner with exits; otherwise as `load_model`."""
    remedy = "load it as EarlyExitVisionEncoderDecoder and train its exits first"
    return on_device(_load((AutoModelForImageTextToText,), name, remedy).eval(), device)


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
    return _load((AutoModel,), name, "train its exits first")


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


def _load(autos: tuple[Any, ...], name: Any, remedy: str) -> Any:
    """A model with exits, through the first of the Auto classes that knows its config."""
    check_named_checkpoint(name)
    trust = {"trust_remote_code": False}  # never asks
    try:
        config = AutoConfig.from_pretrained(name, **trust)
        if isinstance(config, EarlyExitConfig):
            able = [auto for auto in autos if auto.__name__ in config.auto_models]
        else:
            able = [auto for auto in autos if type(config) in auto._model_mapping] or list(autos)
        if not able:
            raise UsageError(f"{name} is an {config.door}, which this command is not for.", field="model", value=config.door)
        model = able[0].from_pretrained(name, **trust)
    except EarlyExitError:
        raise
    except ValueError as error:  # such as a model type that transformers does not know
        raise CheckpointError(f"{name} cannot be loaded: {error}", path=name) from error
    if not isinstance(model, OperatingPoints):
        raise UsageError(f"{name} is a {type(model).__name__}, which has no exits; {remedy}.", field="model")
    return model
