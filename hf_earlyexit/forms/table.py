"""Which forms there are, what each needs of a machine, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from ..errors import UsageError
from ..modeling.protocol import ExitClassifier
from ..registry import unknown_name
from ..serving.bf16 import lacks_bf16, to_bf16
from ..serving.int8 import quantize_int8

FP32, BF16, INT8, ONNX, ONNX_INT8 = FORMS = ("fp32", "bf16", "int8", "onnx", "onnx-int8")
SAME_NUMBERS = (FP32, ONNX)  # float32 within: one calibration is for both
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def what_lacks(form: str, device: torch.device) -> str | None:
    """What a form would need on a device, if anything.

    Args:
        form: one of `FORMS`.
        device: of the model.
    """
    if form in (INT8, ONNX, ONNX_INT8) and device.type != "cpu":
        return f"it is for CPUs, and the model is on {device}"
    if form in (ONNX, ONNX_INT8) and not all(find_spec(package) for package in PACKAGES):
        return 'it needs the extra "onnx": pip install "hf_earlyexit[onnx]"'
    return lacks_bf16(device) if form == BF16 else None


def require(form: str, device: torch.device) -> None:
    """Refuse a form that does not run on a device, or that is none.

    Raises:
        UnknownNameError: with the nearest name and the whole list.
        UsageError: naming what it lacks.
    """
    if form not in FORMS:
        raise unknown_name("form", form, FORMS)
    if (lacking := what_lacks(form, device)) is not None:
        raise UsageError(f"The form {form!r} does not run here: {lacking}.", field="form", value=form)


def made(model: ExitClassifier, form: str) -> Any:
    """A model in a form that runs here. Thresholds stay where numbers are the same; other forms have none.

    Args:
        model: a float32 classifier with exits. It is not changed.
        form: one of `FORMS`.

    Raises:
        UsageError: for a model that cannot have the form.
    """
    require(form, model.device)
    return _MAKE[form](model)


def _onnx(int8: bool) -> Callable[[Any], Any]:
    def make(model: ExitClassifier) -> Any:
        from ..onnx.export import in_memory  # needs the extra

        return in_memory(model, int8)

    return make


_MAKE: dict[str, Callable[[Any], Any]] = {
    FP32: lambda model: model,
    BF16: to_bf16,
    INT8: quantize_int8,
    ONNX: _onnx(False),
    ONNX_INT8: _onnx(True),
}
