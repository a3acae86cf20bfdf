"""The forms in which one model can run on this machine: number formats, and engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import EarlyExitError, UsageError
from ..forms import table
from ..modeling.protocol import TorchExitClassifier
from ..onnx import ONNX_STATIC
from ..serving.bf16 import narrowed, to_bf16
from ..serving.copies import copied
from .ways import Ways, torch_ways

FP16 = "fp16"
SCALE_ROWS = 256  # that fix scales
MEASURED = ("fp32", "bf16", FP16, "int8", "onnx", "onnx-int8", ONNX_STATIC)


class Forms(NamedTuple):
    """What can be measured, and what cannot.

    Attributes:
        models: by the name of the form.
        left_out: the reason by name, of forms that nobody asked for and that do not run here.
    """

    models: dict[str, Any]
    left_out: dict[str, str]


def make_forms(model: TorchExitClassifier, rows: Sequence[Any], names: Sequence[str] | None = None) -> Forms:
    """One model in several forms, all with its policy: good enough to time them. To serve a form, calibrate it.

    Args:
        model: a float32 classifier with exits and a policy. It is not changed.
        rows: encoded; the first of them fix scales, where a form has fixed ones.
        names: of the forms; by default all that this machine runs at more than a crawl.

    Raises:
        UsageError: for a name that is none, or a form that was asked for and does not run here, with what it lacks.
    """
    if unknown := [name for name in names or () if name not in MEASURED]:
        raise UsageError(
            f"forms holds {unknown[0]!r}; expected some of {', '.join(MEASURED)}.", field="forms", value=unknown
        )
    models: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in MEASURED if names is None else names:
        lacking = what_lacks(name, model.device)
        if lacking is None:
            try:
                models[name] = _MAKE[name](model, rows[:SCALE_ROWS])
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
    if name != FP16:
        return table.what_lacks(table.ONNX_INT8 if name == ONNX_STATIC else name, device)
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return "this processor has no instructions for float16"
    return None


class HalfForm:
    """A copy whose layers compute in half precision; its rival is the stock model that is in half precision throughout.

    Args:
        model: a float32 classifier with exits and a policy. It is not changed.
        dtype: of half precision.
    """

    def __init__(self, model: TorchExitClassifier, dtype: torch.dtype) -> None:
        self.served = to_bf16(model) if dtype == torch.bfloat16 else narrowed(copied(model, FP16), dtype)
        self.served.set_exit_policy(model.exit_policy)
        self.stock_model = copy.deepcopy(model).to(dtype)

    def ways(self, batch_size: int, static_layer: int) -> Ways:
        """As `torch_ways`."""
        return torch_ways(self.served, batch_size, static_layer, self.stock_model)


def _int8(model: TorchExitClassifier) -> Any:
    small = table.made(model, table.INT8)
    small.set_exit_policy(model.exit_policy)
    return small


def _onnx(int8: bool, static: bool = False) -> Callable[[Any, Any], Any]:
    def make(model: TorchExitClassifier, rows: Any) -> Any:
        from .onnx_forms import OnnxForm  # needs the extra

        return OnnxForm(model, int8, scale_rows=rows if static else None)

    return make


_MAKE: dict[str, Callable[[Any, Any], Any]] = {
    table.FP32: lambda model, rows: model,
    table.BF16: lambda model, rows: HalfForm(model, torch.bfloat16),
    FP16: lambda model, rows: HalfForm(model, torch.float16),
    table.INT8: lambda model, rows: _int8(model),
    table.ONNX: _onnx(False),
    table.ONNX_INT8: _onnx(True),
    ONNX_STATIC: _onnx(True, static=True),
}
