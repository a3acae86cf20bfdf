"""Text decoders that write one token at a time over a cache of keys and values."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache as remembered
from importlib import import_module
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..errors import EarlyExitConfigError, UsageError
from .context import each
from .plain_gpt2 import is_plain, run_plain

SLIDING = "sliding_attention"
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
    """What every layer needs for N new tokens of each row, besides their states `[B, N, H]`.

    Attributes:
        cache: keys and values, as the layers take them.
        mask: of earlier tokens, `[B or 1, 1, N, T]`, or `None` where nothing is masked.
        positions: of the new tokens, `[B or 1, N]`.
        encoder: hidden states of the encoder, or `None` without one; layers see that they are there and read the cache.
        windowed: the mask of layers that look back no further than a window; `None` as for `mask`.
        rotary: cosines and sines of the positions `[B or 1, N, d]`, where the family turns by them.
        rows: places in the cache of the rows that run, where others of the batch rest.
        plain: layers that were looked at in this run, and whether nothing about them is out of the ordinary.
    """

    cache: Any
    mask: Tensor | None
    positions: Tensor
    encoder: Tensor | None = None
    windowed: Tensor | None = None
    rotary: Any = None
    rows: tuple[int, ...] | None = None
    plain: dict[nn.Module, bool] = field(default_factory=dict)

    def of(self, keep: Tensor, rows: tuple[int, ...]) -> TokenContext:
        """The context of some of its rows, by their places in it; `rows` are their places in the cache.

        What is the same for all rows has one row or none, and stays.
        """

        def kept(part: Tensor) -> Tensor:
            return part if len(part) == 1 else part.index_select(0, keep)

        named = {name: each(getattr(self, name), kept) for name in ("mask", "positions", "windowed", "rotary")}
        return replace(self, rows=rows, **named)


class DecoderBackbone(ABC):
    """A family of decoders, as the steps that decoding needs. Holds no state."""

    crosses: ClassVar[bool] = False  # whether its layers can look at an encoder's states

    @abstractmethod
    def layers(self, decoder: Any) -> nn.ModuleList:
        """The layers, in order."""

    @abstractmethod
    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        """States of new tokens before the first layer, `[B, N, H]`, from their ids `[B, N]`."""

    @abstractmethod
    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        """States after one layer, `[B, N, H]`; the layer adds its keys and values to the cache."""

    @abstractmethod
    def project(self, layer: Any, hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        """The keys and values `[B, heads, 1, d]` that a layer makes of states `[B, 1, H]`, without running it."""

    def project_image(self, layer: Any, encoder: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values `[B, heads, S, d]` that a layer which crosses makes of the encoder's states `[B, S, H]`."""
        raise NotImplementedError

    @abstractmethod
    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        """What the vocabulary layer reads."""

    def vocabulary(self, decoder: Any) -> nn.Linear:
        """The vocabulary layer."""
        return decoder.lm_head

    def rotary(self, decoder: Any, hidden: Tensor, positions: Tensor) -> Any:
        """Cosines and sines of positions `[B, N]`, for families that turn keys and queries by them."""
        return None

    def window(self, decoder: Any) -> int | None:
        """How many tokens the layers with a window see, the token itself included; `None` where every layer sees all."""
        return None

    def context(
        self, decoder: Any, hidden: Tensor, attention_mask: Any, cache: Any, positions: Tensor, encoder: Tensor | None
    ) -> TokenContext:
        """What the layers need for one new token of each row.

        Args:
            decoder: the stock decoder with its head.
            hidden: states before the first layer `[B, 1, H]`.
            attention_mask: of the tokens so far `[B, T]`, or `None`.
            cache: of the tokens before.
            positions: of the new tokens, `[B or 1, 1]`.
            encoder: its states, or `None` without an encoder.
        """

        def masked(create: Callable[..., Any]) -> Any:
            return create(
                config=decoder.config,
                inputs_embeds=hidden,
                attention_mask=attention_mask,
                position_ids=positions,
                **{cache_name(create): cache},
            )

        windowed = masked(create_sliding_window_causal_mask) if self.window(decoder) is not None else None
        rotary = self.rotary(decoder, hidden, positions)
        return TokenContext(cache, masked(create_causal_mask), positions, encoder, windowed, rotary)


class Gpt2Decoder(DecoderBackbone):
    """GPT-2: norms come first in a layer, and one more after the last."""

    crosses = True

    def layers(self, decoder: Any) -> nn.ModuleList:
        return decoder.transformer.h

    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        hidden = decoder.transformer.wte(ids) + decoder.transformer.wpe(positions)
        types = options.get("token_type_ids")
        return hidden if types is None else hidden + decoder.transformer.wte(types)

    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        if hidden.device.type == "cpu" and hasattr(context.cache, "append"):
            if (plain := context.plain.get(layer)) is None:
                plain = context.plain[layer] = is_plain(layer)
            if plain:
                return run_plain(layer, hidden, context)
        return layer(
            hidden,
            attention_mask=context.mask,
            encoder_hidden_states=context.encoder,
            use_cache=True,
            position_ids=context.positions,
            **{cache_name(type(layer).forward): context.cache},
        )

    def project(self, layer: Any, hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        attention, size = layer.attn, hidden.shape[-1]
        states = layer.ln_1(hidden).view(-1, size)
        both = torch.addmm(attention.c_attn.bias[size:], states, attention.c_attn.weight[:, size:])
        keys, values = both.view(len(hidden), 2, attention.num_heads, 1, attention.head_dim).unbind(1)
        return keys, values

    def project_image(self, layer: Any, encoder: Tensor) -> tuple[Tensor, Tensor]:
        cross = layer.crossattention
        both = cross.c_attn(encoder).view(*encoder.shape[:2], 2, cross.num_heads, cross.head_dim)
        keys, values = both.transpose(1, 3).unbind(2)
        return keys, values

    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        return decoder.transformer.ln_f(hidden)


class BertDecoder(DecoderBackbone):
    """BERT as a decoder: norms come last in a layer, and the head has a layer of its own before the vocabulary."""

    crosses = True

    def layers(self, decoder: Any) -> nn.ModuleList:
        return decoder.bert.encoder.layer

    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        return decoder.bert.embeddings(ids, options.get("token_type_ids"), positions.expand(len(ids), -1))

    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        return layer(hidden, context.mask, context.encoder, **{cache_name(type(layer).forward): context.cache})

    def project(self, layer: Any, hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        attention = layer.attention.self
        shape = (len(hidden), attention.num_attention_heads, 1, attention.attention_head_size)
        return attention.key(hidden).view(shape), attention.value(hidden).view(shape)

    def project_image(self, layer: Any, encoder: Tensor) -> tuple[Tensor, Tensor]:
        cross = layer.crossattention.self
        shape = (*encoder.shape[:2], cross.num_attention_heads, cross.attention_head_size)
        return cross.key(encoder).view(shape).transpose(1, 2), cross.value(encoder).view(shape).transpose(1, 2)

    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        return decoder.cls.predictions.transform(hidden)

    def vocabulary(self, decoder: Any) -> nn.Linear:
        return decoder.cls.predictions.decoder


class RotaryDecoder(DecoderBackbone):
    """Llama and its kin: norms first, keys turned by their positions, and layers that may see a window only."""

    def layers(self, decoder: Any) -> nn.ModuleList:
        return decoder.model.layers

    def embed(self, decoder: Any, ids: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
        return decoder.model.embed_tokens(ids)

    def step(self, layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
        slides = getattr(layer.self_attn, "layer_type", None) == SLIDING
        return layer(
            hidden,
            attention_mask=context.windowed if slides else context.mask,
            position_ids=context.positions,
            position_embeddings=context.rotary,
            use_cache=True,
            **{cache_name(type(layer).forward): context.cache},
        )

    def project(self, layer: Any, hidden: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        attention, states = layer.self_attn, layer.input_layernorm(hidden)
        shape = (*hidden.shape[:2], -1, attention.head_dim)
        keys, values = attention.k_proj(states).view(shape), attention.v_proj(states).view(shape)
        if hasattr(attention, "k_norm"):
            keys = attention.k_norm(keys)
        turn = import_module("transformers.models.llama.modeling_llama").apply_rotary_pos_emb  # that of all these families
        keys = keys.transpose(1, 2)
        return turn(keys, keys, *rotary)[1], values.transpose(1, 2)

    def features(self, decoder: Any, hidden: Tensor) -> Tensor:
        return decoder.model.norm(hidden)

    def rotary(self, decoder: Any, hidden: Tensor, positions: Tensor) -> Any:
        return decoder.model.rotary_emb(hidden, position_ids=positions)

    def window(self, decoder: Any) -> int | None:
        kinds = getattr(decoder.config, "layer_types", None) or ()
        return decoder.config.sliding_window if SLIDING in kinds else None


ROTARY_DECODER = RotaryDecoder()
DECODERS: dict[str, DecoderBackbone] = {
    "gpt2": Gpt2Decoder(),
    "bert": BertDecoder(),
    "llama": ROTARY_DECODER,
    "qwen2": ROTARY_DECODER,
    "qwen3": ROTARY_DECODER,
}


def crossing_backbone(model_type: str) -> DecoderBackbone:
    """How to walk the decoder of a captioner.

    Raises:
        EarlyExitConfigError: for a type whose layers cannot look at an encoder's states.
    """
    if model_type not in DECODERS or not DECODERS[model_type].crosses:
        able = [name for name, backbone in DECODERS.items() if backbone.crosses]
        raise EarlyExitConfigError(
            f"decoder.model_type is {model_type!r}; decoders that can exit early are {', '.join(able)}.",
            field="decoder.model_type",
            value=model_type,
        )
    return DECODERS[model_type]
