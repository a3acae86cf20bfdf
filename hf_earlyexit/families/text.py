"""Text encoders."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from ..errors import DataError, UsageError
from .base import Backbone, Context, is_watched
from .packed import Packed, pack, row_lengths

EMBEDDED = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")


class BertBackbone(Backbone):
    """BERT: embeddings, `encoder.layer`, a pooler on the first token."""

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.layer

    def begin(self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Context]:
        _check(model, inputs)
        hidden = model.embeddings(**{name: inputs.get(name) for name in EMBEDDED})
        return hidden, self.frame(model, hidden, inputs.get("attention_mask"), options)

    def packs(self, model: nn.Module) -> bool:
        return model.config._attn_implementation == "sdpa" and all(map(_is_stock, model.encoder.layer))

    def begin_packed(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Context]:
        _check(model, inputs)
        shape = next(inputs[name] for name in EMBEDDED[:2] if inputs.get(name) is not None).shape[:2]
        tokens, context = pack(shape, inputs.get("attention_mask"), model.device)
        if tokens is None:
            return model.embeddings(**{name: inputs.get(name) for name in EMBEDDED}).flatten(0, 1), context
        given = {name: inputs[name] for name in EMBEDDED if inputs.get(name) is not None}
        given = {
            name: values.expand(*shape, *values.shape[2:]).flatten(0, 1)[tokens][None] for name, values in given.items()
        }
        return model.embeddings(**{"position_ids": (tokens % shape[1])[None], **given})[0], context

    def frame(self, model: nn.Module, hidden: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Context:
        mask = create_bidirectional_mask(config=model.config, inputs_embeds=hidden, attention_mask=attention_mask)
        padded = attention_mask is not None and attention_mask.ndim == 2 and mask is not None
        tokens = attention_mask.bool() if padded else None
        return Context(mask, tokens, None if tokens is None else row_lengths(tokens), options)

    def traced_context(self, hidden: Tensor, tokens: Tensor) -> Context:
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.zeros_like(tokens, dtype=hidden.dtype).masked_fill(~tokens, lowest)  # `where` would copy its numbers
        return Context(mask[:, None, None], tokens, None)  # [B, 1, 1, T]

    def step(self, layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        return layer(hidden, context.mask, **context.options)

    def packed_layer(self, layer: nn.Module) -> Callable[[Tensor, Packed], Tensor]:
        return PackedBertLayer(layer)

    def same_input(self, layer: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
        return layer.attention.self, ("query", "key", "value")

    def pool(self, model: nn.Module, hidden: Tensor) -> Tensor:
        return model.pooler(hidden)


class PackedBertLayer:
    """A stock layer for packed rows: its own maps and norms, without what they are wrapped in.

    Args:
        layer: the stock layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        own, after, end = layer.attention.self, layer.attention.output, layer.output
        self.heads = (own.num_attention_heads, own.attention_head_size)
        maps = (own.joint,) if hasattr(own, "joint") else (own.query, own.key, own.value)
        self.inputs = [_bare(linear) for linear in maps]
        self.after, self.norm = _bare(after.dense), _bare(after.LayerNorm)
        self.inner, self.activation = _bare(layer.intermediate.dense), layer.intermediate.intermediate_act_fn
        self.outer, self.last_norm = _bare(end.dense), _bare(end.LayerNorm)

    def __call__(self, hidden: Tensor, context: Packed) -> Tensor:
        """Hidden states after the layer, `[tokens, H]`."""
        # one by one into the call, so that they are gone when the wide maps need memory
        parts = (part for linear in self.inputs for part in linear(hidden).view(len(hidden), -1, *self.heads).unbind(1))
        hidden = self.norm(self.after(context.attend(*parts)) + hidden)
        return self.last_norm(self.outer(self.activation(self.inner(hidden))) + hidden)


def _bare(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a plain module computes, without the module: a tenth of a small layer's time goes into calling modules."""
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return module
    if type(module) is nn.Linear:
        return partial(functional.linear, weight=module.weight, bias=module.bias)
    if type(module) is nn.LayerNorm:
        parts = {"weight": module.weight, "bias": module.bias, "eps": module.eps}
        return partial(functional.layer_norm, normalized_shape=module.normalized_shape, **parts)
    return module


def _check(model: nn.Module, inputs: dict[str, Any]) -> None:
    if model.config._attn_implementation == "flex_attention":  # before its mask, which takes a compilation
        raise UsageError(
            "Attention 'flex_attention' has no plain mask, so finished rows cannot be dropped; "
            "load the model with attn_implementation='sdpa' or 'eager'.",
            field="attn_implementation",
        )
    given, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (given is None) == (embedded is None):
        raise UsageError("Give exactly one of input_ids and inputs_embeds.", field="input_ids")
    shape = (given if embedded is None else embedded).shape
    limit = model.config.max_position_embeddings
    if shape[1] > limit or shape[1] == 0:
        raise DataError(
            f"The input is {shape[1]} tokens long; this model takes 1 to {limit}. "
            "Pass truncation=True to the tokenizer, or split the text.",
            field="input_ids",
            value=shape[1],
        )


def _is_stock(layer: nn.Module) -> bool:
    """Whether a layer does what its class says, and nobody watches the parts of it that packed rows pass by."""
    if type(layer) is not BertLayer or layer.is_decoder or layer.training:
        return False
    own = layer.attention.self
    parts = (layer, layer.attention, own, layer.attention.output, layer.intermediate, layer.output)
    return type(own) is BertSelfAttention and not is_watched(parts)
