"""How to walk a network layer by layer: the only thing that differs between families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers.utils import output_capturing

from ..errors import UsageError


@dataclass(frozen=True)
class Context:
    """What every layer of one call needs besides the hidden states `[B, T, H]`.

    Attributes:
        mask: prepared for the attention in use: `[B, 1, T, T]`, `[B, T]`, or `None` where nothing is masked.
        tokens: True at real tokens `[B, T]`; `None` if no row is padded.
        lengths: on the host, position after the last real token of each row; `None` if no row is padded.
        options: keyword arguments for every layer, the same for all rows.
    """

    mask: Tensor | None
    tokens: Tensor | None
    lengths: tuple[int, ...] | None
    options: dict[str, Any] = field(default_factory=dict)

    def count(self, hidden: Tensor) -> int:
        """Rows."""
        return hidden.shape[0]

    def for_head(self, hidden: Tensor, first_token: bool) -> list[tuple[Tensor, Tensor | None]]:
        """What an exit head reads, in parts that make up all rows in order.

        Args:
            hidden: of these rows.
            first_token: whether the first token alone is enough.

        Returns:
            Hidden states `[B, T, H]`, and which tokens are real `[B, T]`; `None` if no row is padded.
        """
        return [(hidden, self.tokens)]

    def take(self, hidden: Tensor, rows: Sequence[int], index: Tensor) -> tuple[Tensor, Context]:
        """Keep some rows and cut the columns that are padding for all of them.

        Args:
            hidden: `[B, T, H]`.
            rows: their positions, on the host.
            index: the same positions, on the device.
        """
        hidden = hidden.index_select(0, index)
        if self.tokens is None or self.lengths is None:
            mask = None if self.mask is None else self.mask.index_select(0, index)
            return hidden, replace(self, mask=mask)
        lengths = tuple(self.lengths[row] for row in rows)
        width = max(lengths)
        mask = self.mask
        if mask is not None:
            mask = mask.index_select(0, index)
            mask = mask[:, :width] if mask.ndim == 2 else mask[:, :, :width, :width]
        tokens = self.tokens.index_select(0, index)[:, :width]
        return hidden[:, :width], replace(self, mask=mask, tokens=tokens, lengths=lengths)


class Backbone(ABC):
    """A family of networks, as the steps that an exit loop needs. Holds no state."""

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers, in order."""

    @abstractmethod
    def begin(self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Tensor, Context]:
        """Hidden states before the first layer `[B, T, H]`, and the context of all layers.

        Args:
            model: the stock backbone, such as a `BertModel`.
            inputs: the model's own inputs.
            options: keyword arguments for every layer.
        """

    @abstractmethod
    def frame(self, model: nn.Module, hidden: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> Context:
        """The context of rows that stand together in one batch.

        Args:
            model: the stock backbone.
            hidden: `[B, T, H]`, for its shape, dtype and device.
            attention_mask: `[B, T]`, 0 or False at padding; `None` if no row is padded.
            options: keyword arguments for every layer.
        """

    def traced_context(self, hidden: Tensor, tokens: Tensor) -> Context:
        """As `frame`, without looking at any value, so that it can be traced into a graph.

        Args:
            hidden: `[B, T, H]`.
            tokens: True at real tokens `[B, T]`.

        Raises:
            UsageError: where the family cannot be traced.
        """
        raise UsageError(f"{type(self).__name__} cannot be exported: it does not say how to trace its mask.", field="model")

    @abstractmethod
    def step(self, layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after one layer."""

    def packs(self, model: nn.Module) -> bool:
        """Whether rows can be walked end to end, without padding, by `begin_packed` and `packed_layer`.

        Only for networks whose pooler and classifier read the first token alone.
        """
        return False

    def begin_packed(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Context]:
        """As `begin`, but `[tokens, H]` and a `Packed` context; the attention mask is `[B, T]` or not there."""
        raise NotImplementedError

    def packed_layer(self, layer: nn.Module) -> Callable[[Tensor, Any], Tensor]:
        """The layer for packed rows: a function of hidden states `[tokens, H]` and their `Packed` context."""
        raise NotImplementedError

    def same_input(self, layer: nn.Module) -> tuple[nn.Module, tuple[str, ...]] | None:
        """A part of a layer, and the names of its linear maps that read the same input.

        `packed_layer` takes one map in their place, with their outputs side by side, where the part has one named `joint`.
        """
        return None

    @abstractmethod
    def pool(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """The stock model's pooled state of these hidden states, `[B, H]`."""


def is_watched(modules: Iterable[nn.Module]) -> bool:
    """Whether somebody looks at the calls of some modules, so that they must be called.

    Transformers' own hooks, which stay once hidden states were asked for, do nothing outside the stock model's forward.
    """
    for module in modules:
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        own = [hook for hook in hooks if getattr(hook, "__module__", None) != output_capturing.__name__]
        if own or "forward" in vars(module):
            return True
    return False
