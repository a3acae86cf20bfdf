"""A copy of a model that computes its layers' linear maps in 8 bits, for CPUs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError

SMALL, FEW_SIZES = 128, 32  # above the first, multiples of the second: kernels are made anew for every number of tokens
HALF_RANGE = not getattr(
    torch.cpu, "_is_vnni_supported", bool
)()  # older instructions add up in 16 bits, which would overflow


class Int8Linear(nn.Module):
    """A linear map with 8-bit weights, one scale per output, and inputs rounded to 8 bits as they come.

    Args:
        linear: the map to copy.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch plans another way to make 8-bit tensors, but has no fast one yet
            rounded = torch.quantize_per_channel(weight, scale, torch.zeros_like(scale, dtype=torch.long), 0, torch.qint8)
            bias = None if linear.bias is None else linear.bias.detach().float()
            with _fastest_kernels():
                self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, float32."""
        flat = inputs.flatten(0, -2)
        tokens = len(flat)
        missing = -tokens % FEW_SIZES if tokens > SMALL else 0
        if missing:
            flat = functional.pad(flat, (0, 0, 0, missing))
        return torch.ops.quantized.linear_dynamic(flat, self.packed, HALF_RANGE)[:tokens].view(*inputs.shape[:-1], -1)


@contextmanager
def _fastest_kernels() -> Iterator[None]:
    """oneDNN's, where there are any: 2 to 3 times as fast at 256 tokens as those torch takes by itself on x86."""
    backend = torch.backends.quantized
    before = backend.engine
    try:
        if "onednn" in backend.supported_engines:
            backend.engine = "onednn"
        yield
    finally:
        backend.engine = before


def quantize_int8(model: Any) -> Any:
    """A copy of a model whose layers compute in 8 bits: 2 to 4 times as fast on CPUs with 8-bit instructions.

    Heads, pooler, norms and attention stay in float32. The copy has no policy: its logits differ from the model's, so
    thresholds must be chosen anew on a trace of the copy itself (`collect_trace`, `calibrate`, `set_exit_policy`). Inputs
    are rounded by the largest value of their whole batch, so a row's logits depend a little (in the second or third digit)
    on its company; where every row must be reproducible to the last digits, stay with float32.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.

    Returns:
        The copy, in evaluation mode. It cannot be trained or saved.

    Raises:
        UsageError: for a model on another device or of another precision.

    Example:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitBertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> small = ee.quantize_int8(ee.EarlyExitBertForSequenceClassification(config))
        >>> small.exit_policy is None
        True
    """
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise UsageError(
            f"The model is {str(model.dtype).removeprefix('torch.')} on {model.device}; int8 needs float32 on the CPU: "
            'call model.to("cpu").float() first.',
            field="model",
        )
    small = copy.deepcopy(model).eval().requires_grad_(False)
    small.set_exit_policy(None)
    small.save_pretrained = _cannot_save
    for layer in small.backbone.layers(small.base_model):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, Int8Linear(child))
    return small


def _cannot_save(*args: Any, **kwargs: Any) -> None:
    raise UsageError(
        "An int8 copy cannot be saved: save the model it was made from, and call quantize_int8 after loading.", field="model"
    )
