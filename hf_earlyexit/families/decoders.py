"""Text decoders that write one token at a time over a cache of keys and values."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as remembered
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.masking_utils import create_causal_mask
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from ..errors import EarlyExitConfigError, UsageError
from .base import is_watched

CACHE_NAMES = ("cache", "past_key_values")  # what releases of transformers call the cache, the newest name first


@remembered
def cache_name(function: Callable[..., Any]) -> str:
    """The name under which a function or an output class of the installed transformers takes its cache.

    Args:
        function: with a parameter for the cache.

    Raises:
        UsageError: where it has none of the known names; its `**kwargs` would swallow the cache without a word.
    """
    name = next((name for name in CACHE_NAMES if name in inspect.signature(function).parameters), None)
    if name is None:
        raise UsageError(
            f"{function.__qualname__} of transformers {transformers.__version__} takes no {' or '.join(CACHE_NAMES)}; early "
            "exit cannot decode with this release. Install one that the documentation lists as tested.",
            field="transformers",
            value=transformers.__version__,
        )
    return name


def given_cache(cache: Any, options: dict[str, Any]) -> Any:
    """The cache of a call, by whichever name it came; its other names are taken out of `options`.

    Raises:
        UsageError: for a cache under two names.
    """
    given = [value for value in (cache, *(options.pop(name, None) for name in CACHE_NAMES)) if value is not None]
    if len(given) > 1:
        raise UsageError(f"The cache came under two names ({', '.join(CACHE_NAMES)}); give one of them.", field="cache")
    return given[0] if given else None


@dataclass(frozen=True)
class TokenContext:
    """What every layer needs for one new token of each row, besides its state `[B, 1, H]`.

    Attributes:
        cache: keys and values, as the layers take them.
        mask: of earlier tokens, `[B, 1, 1, T]`, or `None` where nothing is masked.
        positions: of the new token, `[B, 1]` or `[1, 1]`.
        encoder: hidden states of the encoder; layers see that they are there and read the cache.
        rows: places in the cache of the rows that run, where others of the batch rest.
    """

    cache: Any
    mask: Tensor | None
    positions: Tensor
    encoder: Tensor
    rows: tuple[int, ...] | None = None


class DecoderBackbone(ABC):
    """A family of decoders with cross attention, as the steps that decoding needs. Holds no state."""

    @abstractmethod
    def layers(self, decoder: Any) -> nn.ModuleList:
        """The layers, in order."""

    @abstractmethod
    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        """States of new tokens before the first layer, `[B, 1, H]`, from their ids `[B, 1]`."""

    @abstractmethod
    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        """States after one layer, `[B, 1, H]`; the layer adds its keys and values to the cache."""

    @abstractmethod
    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `[B, heads, 1, d]` that a layer makes of states `[B, 1, H]`, without running it."""

    @abstractmethod
    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        """What the vocabulary layer reads."""

    @abstractmethod
    def vocabulary(self, decoder: Any) -> nn.Linear:
        """The vocabulary layer."""

    def mask(self, decoder: Any, hidden: Tensor, attention_mask: Tensor | None, cache: Any, at: Tensor) -> Any:
        """The mask over earlier tokens, for the attention in use."""
        return create_causal_mask(
            config=decoder.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            position_ids=at,
            **{cache_name(create_causal_mask): cache},
        )


class Gpt2Decoder(DecoderBackbone):
    """GPT-2: norms come first in a layer, and one more after the last."""

    def layers(self, decoder: Any) -> nn.ModuleList:
        return decoder.transformer.h

    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        hidden = decoder.transformer.wte(ids) + decoder.transformer.wpe(positions)
        types = options.get("token_type_ids")
        return hidden if types is None else hidden + decoder.transformer.wte(types)

    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        if context.rows is not None and hidden.device.type == "cpu" and _is_plain(layer):
            return self._step_some(layer, hidden, context, context.rows)
        return layer(
            hidden,
            attention_mask=context.mask,
            encoder_hidden_states=context.encoder,
            use_cache=True,
            position_ids=context.positions,
            **{cache_name(type(layer).forward): context.cache},
        )

    def _step_some(self, layer: Any, hidden: Tensor, context: TokenContext, rows: tuple[int, ...]) -> Tensor:
        """As the layer does it, but attention reads each row's entries where they lie; copying them out costs more."""
        attention, cross = layer.attn, layer.crossattention
        query, *new = (
            attention.c_attn(layer.ln_1(hidden)).view(len(rows), 1, 3, attention.num_heads, attention.head_dim).unbind(2)
        )
        entries = context.cache.append(attention.layer_idx, *(part.transpose(1, 2) for part in new))
        hidden = hidden + attention.c_proj(_attend(query, entries, rows, context.mask, attention.scaling))
        query = cross.q_attn(layer.ln_cross_attn(hidden)).view(len(rows), 1, cross.num_heads, cross.head_dim)
        entries = context.cache.of_images(attention.layer_idx)
        hidden = hidden + cross.c_proj(_attend(query, entries, rows, None, cross.scaling))
        return hidden + layer.mlp(layer.ln_2(hidden))

    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention, size = layer.attn, hidden.shape[-1]
        states = layer.ln_1(hidden).view(-1, size)
        both = torch.addmm(attention.c_attn.bias[size:], states, attention.c_attn.weight[:, size:])
        keys, values = both.view(len(hidden), 2, attention.num_heads, 1, attention.head_dim).unbind(1)
        return keys, values

    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        return decoder.transformer.ln_f(hidden)

    def vocabulary(self, decoder: Any) -> nn.Linear:
        return decoder.lm_head


def _is_plain(layer: Any) -> bool:
    """Whether a GPT-2 layer is the stock one with plain attention, and nobody watches it."""
    plain = layer.attn.config._attn_implementation == "sdpa" and not layer.training
    return plain and type(layer) is GPT2Block and not is_watched((layer, layer.attn, layer.crossattention))


def _attend(query: Tensor, entries: Any, rows: tuple[int, ...], mask: Tensor | None, scale: float) -> Tensor:
    """Attention of one token of each row `[R, 1, heads, d]` to the row's own entries among those of a batch, `[R, 1, H]`."""
    mixed = []
    for place, row in enumerate(rows):
        row_mask = mask if mask is None or len(mask) == 1 else mask[place : place + 1]
        keys, values = (part[row : row + 1] for part in entries)
        row_query = query[place : place + 1].transpose(1, 2)
        mixed.append(functional.scaled_dot_product_attention(row_query, keys, values, attn_mask=row_mask, scale=scale))
    return torch.cat(mixed).flatten(1)[:, None]


class BertDecoder(DecoderBackbone):
    """BERT as a decoder: norms come last in a layer, and the head has a layer of its own before the vocabulary."""

    def layers(self, decoder: Any) -> nn.ModuleList:
        return decoder.bert.encoder.layer

    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        return decoder.bert.embeddings(ids, options.get("token_type_ids"), positions.expand(len(ids), -1))

    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        return layer(hidden, context.mask, context.encoder, **{cache_name(type(layer).forward): context.cache})

    def project(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        attention = layer.attention.self
        shape = (len(hidden), attention.num_attention_heads, 1, attention.attention_head_size)
        return attention.key(hidden).view(shape), attention.value(hidden).view(shape)

    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        return decoder.cls.predictions.transform(hidden)

    def vocabulary(self, decoder: Any) -> nn.Linear:
        return decoder.cls.predictions.decoder


DECODERS: dict[str, DecoderBackbone] = {"gpt2": Gpt2Decoder(), "bert": BertDecoder()}


def decoder_backbone(model_type: str) -> DecoderBackbone:
    """How to walk decoders of this type.

    Raises:
        EarlyExitConfigError: for a type that is not known.
    """
    if model_type not in DECODERS:
        raise EarlyExitConfigError(
            f"decoder.model_type is {model_type!r}; decoders that can exit early are {', '.join(DECODERS)}.",
            field="decoder.model_type",
            value=model_type,
        )
    return DECODERS[model_type]
