"""A copy of a model that computes its layers' linear maps in 8 bits, for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..modeling.exits import require_float32_on_cpu
from ..modeling.protocol import Wrapped
from ..modeling.wrapped import unwrapped_without_adapters
from .copies import checksum, copied, joint_weight, replace_maps

SMALL, FEW_SIZES = 128, 32  # above the first, multiples of the second: kernels are made anew for every number of tokens
# Of a weight. Instructions before VNNI add two products up in 16 bits, where 2 * 255 * 63 just fits.
LARGEST = 127 if getattr(torch.cpu, "_is_vnni_supported", bool)() else 63
PLAIN: Any = (None, 1.0, 0, torch.float32, "none", [], "")  # no bias, no scale or zero of outputs, nothing after
SCALE_BYTES = 8  # bytes after a rounded token: its step and its lowest value, float32


class Int8Linear(nn.Module):
    """Linear maps with 8-bit weights, one scale per output, and inputs rounded to 8 bits as they come, each token by itself.

    Sums of rounded numbers are exact, so a token's outputs are the same to the bit in every company.

    Args:
        linears: the maps to copy; all read the same input, and their outputs stand side by side.
    """

    computes_in = "int8"  # what traces of a model with such maps say

    def __init__(self, *linears: nn.Linear) -> None:
        super().__init__()
        weight, self.offset = joint_weight(linears)
        scale = weight.abs().amax(1).clamp_min(1e-12) / LARGEST
        rounded = functional.pad((weight / scale[:, None]).round(), (0, SCALE_BYTES)).to(torch.int8)
        self.scale, self.sums, self.width = scale, weight.sum(1), len(weight)
        self.zeros = torch.zeros(self.width, dtype=torch.int32)
        fast = torch.backends.mkldnn.is_available()
        self.register_buffer("checksum", checksum(rounded, self.scale, self.sums, self.offset))
        self.packed = torch.ops.onednn.qlinear_prepack(rounded, None) if fast else None
        self.rounded = None if fast else rounded.float()

    def forward(self, inputs: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`, float32."""
        # one pass that finds every token's lowest value and step, and writes it in 8 bits, with the two behind it
        tokens = torch.ops.quantized.embedding_bag_byte_prepack(inputs.flatten(0, -2))  # [tokens, in + 8]
        scales = tokens[:, -SCALE_BYTES:]
        scales = scales if tokens.shape[1] % 4 == 0 else scales.contiguous()  # numbers of 4 bytes are read where they stand
        step, lowest = scales.view(torch.float32).split(1, 1)
        outputs = self._multiply(tokens).mul_(step).addcmul_(lowest, self.sums).add_(self.offset)
        return outputs.view(*inputs.shape[:-1], self.width)

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        return self  # it never changes, and packed weights cannot be copied

    def _multiply(self, tokens: Tensor) -> Tensor:
        """Products of 8-bit tokens `[tokens, in + 8]` with the weights `[tokens, out]`; the last 8 weights are 0."""
        if self.packed is None:  # no 8-bit kernels here: right, but no faster than float32
            assert self.rounded is not None
            return functional.linear(tokens.float(), self.rounded).mul_(self.scale)
        count = tokens.shape[0]  # `len` of a tensor takes eight times as long
        missing = -count % FEW_SIZES if count > SMALL else 0
        if missing:  # whatever stands in the rest: every token has its own products
            given, tokens = tokens, tokens.new_empty(count + missing, tokens.shape[1])
            tokens[:count] = given
        products: Tensor = torch.ops.onednn.qlinear_pointwise(tokens, 1.0, 0, self.packed, self.scale, self.zeros, *PLAIN)
        return products[:count] if missing else products


def quantize_int8(model: Wrapped) -> Any:
    """A copy of a model whose layers compute in 8 bits: 2 to 4 times as fast on CPUs with 8-bit instructions.

    Heads, pooler, norms and attention stay in float32. The copy has no policy and no operating points, and nothing that was
    promised of the model holds for it: its logits differ from the model's, so
    thresholds must be chosen anew on a trace of the copy itself (`collect_trace`, `calibrate`, `set_exit_policy`). Every
    token is rounded by its own values, so a row's answer does not depend on its company.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.

    Returns:
        The copy, in evaluation mode. It cannot be trained or saved.

    Raises:
        UsageError: for a model on another device or of another precision.

    Examples:
        >>> import hf_earlyexit as ee
        >>> config = ee.EarlyExitBertConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
        >>> small = ee.quantize_int8(ee.EarlyExitBertForSequenceClassification(config))
        >>> small.exit_policy is None
        True
    """
    require_float32_on_cpu(unwrapped_without_adapters(model, "int8"), "int8")
    small = copied(model, "int8")
    replace_maps(small, Int8Linear)
    return small
