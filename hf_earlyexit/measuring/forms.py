"""The forms in which one model can run on this machine: number formats, and engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from ..errors import EarlyExitError, UsageError
from ..serving.int8 import quantize_int8

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("fp32", *HALF, "int8", "onnx", "onnx-int8")


class Forms(NamedTuple):
    """What can be measured, and what cannot.

    Attributes:
        models: by the name of the form.
        left_out: the reason by name, of forms that nobody asked for and that do not run here.
    """

    models: dict[str, Any]
    left_out: dict[str, str]


def make_forms(model: Any, names: Sequence[str] | None = None) -> Forms:
    """One model in several forms, all with its policy: good enough to time them. To serve a form, calibrate it.

    Args:
        model: a float32 classifier with exits and a policy. It is not changed.
        names: of the forms; by default all that this machine runs at more than a crawl.

    Raises:
        UsageError: for a name that is none, or a form that was asked for and does not run here, with what it lacks.
    """
    if unknown := [name for name in names or () if name not in FORMS]:
        raise UsageError(f"forms holds {unknown[0]!r}; expected some of {', '.join(FORMS)}.", field="forms", value=unknown)
    models: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in FORMS if names is None else names:
        lacking = what_lacks(name, model.device)
        if lacking is None:
            try:
                models[name] = _MAKE[name](model)
                continue
            except EarlyExitError as error:
                if names is not None:
                    raise
                lacking = str(error)
        if names is not None:
            raise UsageError(f"The form {name!r} does not run here: {lacking}.", field="forms", value=name)
        left_out[name] = lacking
    return Forms(models, left_out)


def what_lacks(name: str, device: torch.device) -> str | None:
    """What a form would need here, if anything."""
    cpu = device.type == "cpu"
    if name in ("int8", "onnx", "onnx-int8") and not cpu:
        return f"it is for CPUs, and the model is on {device}"
    if name.startswith("onnx") and not all(find_spec(package) for package in ("onnx", "onnxruntime", "onnxscript")):
        return 'it needs the extra "onnx": pip install "hf_earlyexit[onnx]"'
    if name == "bf16" and cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this processor has no instructions for bfloat16"
    if name == "fp16" and cpu and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this processor has no instructions for float16"
    return None


def _half(name: str) -> Callable[[Any], Any]:
    return lambda model: copy.deepcopy(model).to(HALF[name])


def _int8(model: Any) -> Any:
    small = quantize_int8(model)
    small.set_exit_policy(model.exit_policy)
    return small


def _onnx(int8: bool) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        from .onnx_forms import OnnxForm  # needs the extra

        return OnnxForm(model, int8)

    return make


_MAKE: dict[str, Callable[[Any], Any]] = {
    "fp32": lambda model: model,
    **{name: _half(name) for name in HALF},
    "int8": _int8,
    "onnx": _onnx(False),
    "onnx-int8": _onnx(True),
}
