"""The classifier that answers, taken out of whatever was given as a model."""

from __future__ import annotations

import torch

from ..errors import UsageError
from ..modeling.classifier import EarlyExitClassifier
from ..modeling.protocol import ExitClassifier, ExitModel, Wrapped
from ..modeling.wrapped import unwrapped
from .batching import evaluating


def served_classifier(model: Wrapped) -> ExitClassifier:
    """A classifier with exits in evaluation mode; nothing is written on what was given.

    Args:
        model: a classifier with exits, an exported one, or what `unwrapped` takes around one.

    Raises:
        UsageError: for another model.
    """
    inner = unwrapped(model)
    if not isinstance(inner, EarlyExitClassifier) and not hasattr(inner, "walker"):
        raise UsageError(
            f"{type(inner).__name__} is no classifier; its answers come from generate(...) or its own pipeline.",
            field="model",
        )
    served: ExitClassifier = evaluating(inner)
    return served


def form_of(model: ExitModel) -> str:
    """The form in which a model answers: "fp32", "bf16", "int8", "onnx" or "onnx-int8"; else the dtype of its weights."""
    form = getattr(model, "form", None)
    return str(form or ("fp32" if model.dtype == torch.float32 else str(model.dtype).removeprefix("torch.")))
