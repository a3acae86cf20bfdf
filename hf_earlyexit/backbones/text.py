"""Text encoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask

from ..errors import DataError, UsageError
from .base import Backbone, Context


class BertBackbone(Backbone):
    """BERT: embeddings, `encoder.layer`, a pooler on the first token."""

    def layers(self, model: nn.Module) -> nn.ModuleList:
        return model.encoder.layer

    def begin(self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Context]:
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
        hidden = model.embeddings(
            input_ids=given,
            token_type_ids=inputs.get("token_type_ids"),
            position_ids=inputs.get("position_ids"),
            inputs_embeds=embedded,
        )
        return hidden, self.frame(model, hidden, inputs.get("attention_mask"), options)

    def frame(self, model: nn.Module, hidden: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Context:
        mask = create_bidirectional_mask(config=model.config, inputs_embeds=hidden, attention_mask=attention_mask)
        padded = attention_mask is not None and attention_mask.ndim == 2 and mask is not None
        tokens = attention_mask.bool() if padded else None
        return Context(mask, tokens, None if tokens is None else row_lengths(tokens), options)

    def traced_context(self, hidden: Tensor, tokens: Tensor) -> Context:
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.where(tokens, 0.0, lowest)[:, None, None]  # [B, 1, 1, T]
        return Context(mask.to(hidden.dtype), tokens, None)

    def step(self, layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        return layer(hidden, context.mask, **context.options)

    def pool(self, model: nn.Module, hidden: Tensor) -> Tensor:
        return model.pooler(hidden)


def row_lengths(tokens: Tensor) -> tuple[int, ...]:
    """Position after the last real token of each row; the full width for a row without any."""
    width = tokens.shape[1]
    return tuple((width - tokens.flip(1).int().argmax(1)).tolist())
