"""What differs between families of networks, as a row of data; everything else is written once, here.

A `Family` says where the layers are, how hidden states begin, what a layer needs beside them and what makes the last answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UsageError
from .context import Context, Part, join_kept, row_lengths, widened

TEXT, IMAGE, WRITING = "text-classification", "image-classification", "text-generation"
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
FIRST, LAST = "first", "last"
CAPTURING = "transformers.utils.output_capturing"


class Frame(NamedTuple):
    """What the context of a batch is made from.

    Attributes:
        model: the stock backbone, such as a `BertModel`.
        hidden: states before the first layer `[B, T, H]`, for their shape, dtype and device.
        attention_mask: `[B, T]`, 0 or False at padding; `None` if no row is padded.
        position_ids: `[B, T]`; `None` where they count from 0.
        traced: no value may be looked at, so that it can be traced into a graph.
        packed: the context of rows that stand end to end, where they do; `hidden` is then `[1, tokens, H]`.
    """

    model: Any
    hidden: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None = None
    traced: bool = False
    packed: Any = None


class Framed(NamedTuple):
    """Entries of a `Context`, and whether some row is padded."""

    per_row: dict[str, Any]
    shared: dict[str, Any]
    axes: dict[str, tuple[int, ...]]
    padded: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of networks. Paths lead from the stock backbone; functions take it first.

    Args:
        name: as in the names of transformers' classes, "Roberta".
        layers: path of the layer list, or a function that gives the layers in order; one may come again.
        embed: model, inputs to hidden states before the first layer `[B, T, H]`.
        frame: what the layers need beside the hidden states.
        call: layer, hidden states, context to hidden states after it: the stock layer, called as the stock model calls it.
        final_norm: path of the norm after the last layer, which every exit reads through; `None` where there is none.
        answer: classifier with exits and the `Part` behind the final norm to the stock logits `[B, C]`.
        one_token: whether the last answer reads a single token; may depend on the config.
        token: which token that is, the first or the last real one.
        pool: classifier and hidden states `[B, 1, H]` to the stock pooled state `[B, H]`; `None` where the stock model has
            none that exits could borrow.
        positions: model and inputs to the positions the stock model counts `[B or 1, T]`.
        keeps_positions: whether layers or their masks read positions, so that those that were given must go with the rows.
        longest: config to the most tokens of an input.
        check: refuses inputs the model cannot read.
        dropout: names of the config's dropout before a classifier; the first that is set counts.
        inputs: names of the model's inputs.
        packed: a class whose objects run one layer on rows without padding; `None` for padded rows only.
        same_input: path of a layer's part, and names of its linear maps that read the same input: `packed` takes one map in
            their place, with their outputs side by side, where the part has one named `joint`.
        between: paths of parts that run between layers, in the number format of these.
        is_watched: whether transformers collects hidden states and attentions by itself where they are asked for.
        untraced: why the family cannot become a graph; empty where it can.
        task: what the stock classifier does.
        writer: end of the name of the stock class that writes text, such as "ForCausalLM"; empty where there is none.
    """

    name: str
    layers: str | Callable[[Any], Sequence[nn.Module]]
    embed: Callable[[Any, dict[str, Any]], Tensor]
    frame: Callable[[Frame], Framed]
    call: Callable[[nn.Module, Tensor, Context], Tensor]
    answer: Callable[[Any, Part], Tensor]
    check: Callable[[Family, Any, dict[str, Any]], None]
    final_norm: str | None = None
    one_token: bool | Callable[[Any], bool] = True
    token: str = FIRST
    pool: Callable[[Any, Tensor], Tensor] | None = None
    positions: Callable[[Any, dict[str, Any]], Tensor | None] | None = None
    keeps_positions: bool = False
    longest: Callable[[Any], int] = attrgetter("max_position_embeddings")
    dropout: tuple[str, ...] = ("classifier_dropout", "hidden_dropout_prob")
    inputs: tuple[str, ...] = TEXT_INPUTS
    packed: Any = None
    same_input: tuple[str, tuple[str, ...]] | None = None
    between: tuple[str, ...] = ()
    is_watched: bool = True
    untraced: str = ""
    task: str = TEXT
    writer: str = ""

    # --- what every family shares ---------------------------------------------------------------------------------

    @cached_property
    def layers_of(self) -> Callable[[Any], Sequence[nn.Module]]:
        """The layers of a stock backbone, in order."""
        return attrgetter(self.layers) if isinstance(self.layers, str) else self.layers

    def norm_of(self, model: Any) -> Any:
        """The norm that exits read through; `None` where there is none."""
        return None if self.final_norm is None else attrgetter(self.final_norm)(model)

    def reads_one_token(self, config: Any) -> bool:
        """Whether the last answer reads a single token."""
        return self.one_token(config) if callable(self.one_token) else self.one_token

    def dropout_of(self, config: Any) -> float:
        """Dropout of the stock model before its classifier, 0 to 1; 0 where it has none."""
        values = (getattr(config, name, None) for name in self.dropout)
        return next((float(value) for value in values if value is not None), 0.0)

    def segments_of(self, config: Any) -> int | None:
        """Token types a model knows, 0 to this number - 1; `None` where it reads none."""
        return (getattr(config, "type_vocab_size", None) or None) if "token_type_ids" in self.inputs else None

    def begin(self, model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Context]:
        """Hidden states before the first layer `[B, T, H]`, and the context of all layers.

        Args:
            model: the stock backbone.
            inputs: the model's own inputs; others are passed over, as the stock model does.
            options: keyword arguments for every layer.

        Raises:
            UsageError, DataError: for inputs the model cannot read.
        """
        self.check(self, model, inputs)
        hidden = self.embedded(model, inputs)
        kept = self._kept(model, inputs, hidden)
        return hidden, self.context(model, hidden, inputs.get("attention_mask"), kept, options)

    def embedded(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Hidden states before the first layer `[B, T, H]`; inputs of other families are passed over."""
        return self.embed(model, {name: inputs.get(name) for name in self.inputs})

    def context(
        self,
        model: Any,
        hidden: Tensor,
        attention_mask: Tensor | None,
        kept: dict[str, Tensor],
        options: dict[str, Any],
        traced: bool = False,
    ) -> Context:
        """The context of rows that stand together in one batch.

        Args:
            model: the stock backbone.
            hidden: `[B, T, H]`, for its shape, dtype and device.
            attention_mask: `[B, T]`, 0 or False at padding; `None` if no row is padded.
            kept: as in `Context`.
            options: keyword arguments for every layer.
            traced: look at no value, so that it can be traced into a graph; lengths are left open.
        """
        framed = self.frame(Frame(model, hidden, attention_mask, kept.get("position_ids"), traced))
        tokens = lengths = None
        if framed.padded and attention_mask is not None:
            tokens = attention_mask.bool()
            lengths = None if traced else row_lengths(tokens, kept.get("answering"))
        return Context(framed.per_row, framed.shared, framed.axes, tokens, lengths, kept, options)

    def join(self, model: Any, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        """Padded batches of the same depth as one, as wide as the widest."""
        width = max(hidden.shape[1] for hidden, _ in parts)
        joined = torch.cat([widened(hidden, width) for hidden, _ in parts])
        masks = [widened(hidden.new_ones(hidden.shape[:2]) if c.tokens is None else c.tokens, width) for hidden, c in parts]
        return joined, self.context(model, joined, torch.cat([m.bool() for m in masks]), join_kept(parts, width), {})

    def begin_packed(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Context]:
        """As `begin`, but `[tokens, H]` and a `Packed` context; the attention mask is `[B, T]` or not there."""
        begun: tuple[Tensor, Context] = self.packed.begin(self, model, inputs)
        return begun

    def packs(self, model: Any) -> bool:
        """Whether rows can be walked end to end, by `begin_packed` and `packed_layer`, without anybody noticing."""
        if self.packed is None or model.config._attn_implementation != "sdpa":
            return False
        return all(map(self.packed.fits, self.layers_of(model)))

    def why_padded(self, model: Any) -> str | None:
        """Why rows of several lengths are padded, in words; `None` where they stand end to end, or all have one length."""
        attention = model.config._attn_implementation
        if self.task == IMAGE or self.packs(model):
            return None
        if self.packed is None:
            return f"{self.name} layers compute attention in a way of their own"
        if attention != "sdpa":
            return f"the model was loaded with attn_implementation={attention!r}, and only 'sdpa' does without padding"
        return "parts of the layers have been exchanged, are watched or are in training mode"

    def packed_layer(self, layer: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        """The layer for packed rows: a function of hidden states `[tokens, H]` and their `Packed` context."""
        run: Callable[[Tensor, Any], Tensor] = self.packed(self, layer)
        return run

    def require_traceable(self) -> None:
        """Refuse what cannot become a graph.

        Raises:
            UsageError: telling why.
        """
        if self.untraced:
            raise UsageError(f"{self.name} models cannot be exported: {self.untraced}", field="model")

    def _kept(self, model: Any, inputs: dict[str, Any], hidden: Tensor) -> dict[str, Tensor]:
        kept = {}
        if self.keeps_positions and inputs.get("position_ids") is not None:
            kept["position_ids"] = inputs["position_ids"].expand(hidden.shape[:2])
        if self.token == LAST:
            kept["answering"] = last_token(model.config, inputs)
        return kept


def last_token(config: Any, inputs: dict[str, Any]) -> Tensor:
    """Place of the token that answers for each row `[B]`: the last one that is not the padding token, as in the stock model.

    Where the config's padding token is below 0, which no token is, the attention mask tells the last one.

    Args:
        config: the model's.
        inputs: token ids or embeddings, and the attention mask where there is one.

    Raises:
        UsageError: for several rows where the config tells no padding token.
    """
    ids, pad, mask = inputs.get("input_ids"), config.get_text_config().pad_token_id, inputs.get("attention_mask")
    if pad is not None and pad < 0 and mask is not None:
        last: Tensor = mask.shape[1] - 1 - mask.bool().flip(1).int().argmax(1)
        return last
    rows = inputs["inputs_embeds"] if ids is None else ids
    if pad is None and len(rows) != 1:
        raise UsageError(
            "The model reads each row's last real token, and its config has no pad_token_id to tell it from padding: set "
            "model.config.pad_token_id to the tokenizer's, or give one row at a time.",
            field="pad_token_id",
        )
    if ids is None or pad is None:
        return torch.full(rows.shape[:1], rows.shape[1] - 1, device=rows.device)
    places: Tensor = torch.arange(ids.shape[1], device=ids.device) * (ids != pad)
    return places.argmax(-1)


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody looks at the calls of some modules, so that they must be called.

    Transformers' own hooks, which stay once hidden states were asked for, do nothing outside the stock model's forward.
    """
    for module in modules:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        foreign = [hook for hook in hooks if getattr(hook, "__module__", None) != CAPTURING]
        if foreign or "forward" in vars(module):
            return True
    return False
