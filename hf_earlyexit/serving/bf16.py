"""A copy of a model whose layers compute in bfloat16: on CPUs with instructions for it, and on accelerators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..families.base import Family, Frame, Framed
from ..families.context import each
from ..modeling.protocol import Wrapped
from ..modeling.wrapped import unwrapped_without_adapters
from .copies import checksum, copied, joint_weight, layers_of, replace_maps

MOST, STEP = 448, 32  # inputs that are added up in one go whatever the number of tokens; a multiple of the second


class Bf16Linear(nn.Module):
    """Linear maps in bfloat16 whose weights are laid out for the processor's instructions.

    Products are added up in float32 over at most `MOST` inputs, and rounded before the next are added: the processor's
    library would cut a longer sum in other places for another number of tokens, so that a token's outputs changed with its
    company. So they are the same to the bit in every company.

    Args:
        linears: the maps to copy; all read the same input, and their outputs stand side by side.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight, bias = (part.bfloat16() for part in joint_weight(linears))
        self.width, count = weight.shape[1], -(-weight.shape[1] // MOST)
        self.cut = -(-weight.shape[1] // count // STEP) * STEP
        self.bias = bias
        self.parts = [torch.ops.mkldnn._reorder_linear_weight(part.contiguous()) for part in weight.split(self.cut, 1)]
        self.register_buffer("checksum", checksum(weight, bias))

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, bfloat16."""
        tokens = inputs.reshape(-1, self.width)
        first, *rest = tokens.split(self.cut, 1)
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(first, self.parts[0], self.bias, "none", [], "")
        for part, weight in zip(rest, self.parts[1:], strict=True):
            outputs = torch.ops.mkldnn._linear_pointwise.binary(part, outputs, weight, None, "add")
        return outputs.view(*inputs.shape[:-1], len(self.bias))

    def __deepcopy__(self, memo: dict[int, Any]) -> Bf16Linear:
        return self  # it never changes, and weights that are laid out cannot be copied


def to_bf16(model: Wrapped) -> Any:
    """A copy of a model whose layers compute in bfloat16, for processors with instructions for it.

    Embeddings, pooler, norms before exits, heads and policies stay in float32: in bfloat16 scores tie. The copy has no
    policy and no operating points, and nothing that was promised of the model holds for it: its logits differ from the
    model's, so thresholds must be chosen anew on a trace of the copy itself (`collect_trace`, `calibrate`,
    `set_exit_policy`; or all at once by `convert`).

    Args:
        model: a float32 classifier with exits. It is not changed.

    Returns:
        The copy, in evaluation mode. It cannot be trained or saved.

    Raises:
        UsageError: for a model of another precision, or on a device without instructions for bfloat16.

    Examples:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitBertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> model = ee.EarlyExitBertForSequenceClassification(config)
        >>> copy = to_bf16(model) if lacks_bf16(model.device) is None else None
    """
    if (lacking := lacks_bf16(unwrapped_without_adapters(model, "bf16").device)) is not None:
        raise UsageError(f"The form 'bf16' does not run here: {lacking}.", field="model")
    new = copied(model, "bf16")
    if new.device.type == "cpu":
        replace_maps(new, Bf16Linear)
    return narrowed(new, torch.bfloat16)


def lacks_bf16(device: torch.device) -> str | None:
    """What bfloat16 would need on a device, if anything."""
    if device.type == "cpu" and not _supported():
        return "this processor has no instructions for bfloat16 (avx512_bf16 or amx_bf16, as lscpu names them)"
    return None


def _supported() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def narrowed(model: Any, dtype: torch.dtype) -> Any:
    """Let the layers of a copy compute in a dtype, and everything else in float32.

    Args:
        model: from `copied`; it is changed.
        dtype: narrower than float32.
    """
    family: Family = model.family
    for part in (*layers_of(model), *(attrgetter(path)(model.base_model) for path in family.between)):
        if part is not None:
            part.to(dtype)
    model.family = replace(
        family, embed=partial(_embedded, family.embed, dtype), frame=partial(_framed, family.frame, dtype)
    )
    model.layer_dtype = dtype
    model.register_buffer("layers_rounded", torch.tensor(torch.finfo(dtype).bits))  # weights may be of that dtype already
    return model


def _embedded(embed: Callable[..., Tensor], dtype: torch.dtype, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return embed(model, inputs).to(dtype)


def _framed(frame: Callable[[Frame], Framed], dtype: torch.dtype, given: Frame) -> Framed:
    """What layers need besides, in the dtype of the layers: position biases come from float32 weights."""

    def rounded(values: dict[str, Any]) -> dict[str, Any]:
        return {name: _rounded(value, dtype) for name, value in values.items()}

    framed = frame(given)
    return framed._replace(per_row=rounded(framed.per_row), shared=rounded(framed.shared))


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    def one(part: Any) -> Any:  # a size or a part of the model stays as it is
        return part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part

    return each(value, one)
