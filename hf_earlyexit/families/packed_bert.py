"""BERT's layer for packed rows: the one layer that is worth a form of its own, as it is measured to pay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from .base import Family, is_watched
from .context import Context
from .packed import Packed
from .packed_stock import begin_packed, is_stock


class PackedBertLayer:
    """A stock layer of BERT's shape for packed rows: its own maps and norms, without what they are wrapped in.

    Args:
        family: of the layer.
        layer: the stock layer.
    """

    frames: ClassVar[bool] = False

    def __init__(self, family: Family, layer: Any) -> None:
        attention, after, end = layer.attention.self, layer.attention.output, layer.output
        self.heads = (attention.num_attention_heads, attention.attention_head_size)
        maps = (attention.joint,) if hasattr(attention, "joint") else (attention.query, attention.key, attention.value)
        self.inputs = [_bare(linear) for linear in maps]
        self.after, self.norm = _bare(after.dense), _bare(after.LayerNorm)
        self.inner, self.activation = _bare(layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        self.outer, self.last_norm = _bare(end.dense), _bare(end.LayerNorm)

    def __call__(self, hidden: Tensor, context: Packed) -> Tensor:
        """Hidden states after the layer, `[tokens, H]`."""
        # one by one into the call, so that they are gone when the wide maps need memory
        parts = (part for linear in self.inputs for part in linear(hidden).view(hidden.shape[0], -1, *self.heads).unbind(1))
        hidden = self.norm(self.after(context.attend(*parts)) + hidden)  # type: ignore[arg-type]  # three of them
        return self.last_norm(self.outer(self.activation(self.inner(hidden))) + hidden)

    @staticmethod
    def begin(family: Family, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Context]:
        """Hidden states `[tokens, H]` and their context."""
        return begin_packed(family, model, inputs)[:2]

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a layer does what its class says, and nobody watches the parts of it that packed rows pass by."""
        if not is_stock(layer) or layer.is_decoder:
            return False
        attention = layer.attention.self
        parts = (layer, layer.attention, attention, layer.attention.output, layer.intermediate, layer.output)
        return is_stock(attention) and not is_watched(parts)


def _bare(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a plain module computes, without the module: a tenth of a small layer's time goes into calling modules."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return module
    if type(module) is nn.Linear:
        return partial(functional.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        parts: dict[str, Any] = {"weight": module.weight, "bias": module.bias, "eps": module.eps}
        return partial(functional.layer_norm, normalized_shape=module.normalized_shape, **parts)
    return module
