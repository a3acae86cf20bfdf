"""One decoding step's view of a cache: layers see the rows that are still under way, and every row gets its entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..errors import UsageError


class Entry(NamedTuple):
    """Keys and values, `[B, heads, T, d]`."""

    keys: Tensor
    values: Tensor

    def of(self, rows: Tensor) -> Entry:
        """Those of some rows of the batch."""
        return Entry(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class TokenCache(EncoderDecoderCache):
    """The cache that the layers are given while one token per row is decoded.

    Args:
        cache: of all rows; grows by one entry per row and layer.
        project: makes the entry that a layer (1-based) has of states `[B, 1, H]` that do not run it.

    Raises:
        UsageError: for a cache whose rows cannot be taken apart.
    """

    def __init__(self, cache: EncoderDecoderCache, project: Callable[[int, Tensor], Entry]) -> None:
        require_dynamic(cache)
        self.is_updated = cache.is_updated
        self.self_attention_cache = _OwnEntries(cache.self_attention_cache.layers, project)
        self.cross_attention_cache = _CrossEntries(cache.cross_attention_cache.layers)

    def keep(self, rows: Tensor, left: Tensor, states: Tensor) -> None:
        """Let the layers see some rows only.

        Args:
            rows: numbers of those rows in the whole batch.
            left: numbers of the others.
            states: what the others left with `[left, 1, H]`.
        """
        self_attention = self.self_attention_cache
        self_attention.rows, self_attention.left, self_attention.states = rows, left, states
        self.cross_attention_cache.rows = rows

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Entry:
        """Append the entries of layer `layer` (0-based), as `update` does.

        Args:
            layer: counted as in transformers' caches.
            keys, values: of the rows that the layers see.

        Returns:
            The entries of all rows of the batch so far.
        """
        return self.self_attention_cache.append(keys, values, layer)

    def of_images(self, layer: int) -> Entry:
        """Entries of the images of all rows of the batch, in layer `layer` (0-based)."""
        entry = self.cross_attention_cache.all[layer]
        return Entry(entry.keys, entry.values)

    def close(self, layer: int, states: Tensor) -> None:
        """Append the entries of a layer (1-based) that no row runs, from the states of all rows `[B, 1, H]`."""
        self_attention = self.self_attention_cache
        self_attention.layers[layer - 1].update(*self_attention.project(layer, states))


class _OwnEntries:
    """Self attention: each layer appends one entry for every row, run or not."""

    def __init__(self, layers: list[Any], project: Callable[[int, Tensor], Entry]) -> None:
        self.layers, self.project = layers, project
        self.rows: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Entry:
        entry = self.append(keys, values, layer)
        return entry if self.rows is None else entry.of(self.rows)

    def append(self, keys: Tensor, values: Tensor, layer: int) -> Entry:
        new = Entry(keys, values)
        if self.rows is not None:
            new = Entry(*map(self._together, new, self.project(layer + 1, self.states)))
        return Entry(*self.layers[layer].update(*new))

    def _together(self, running: Tensor, others: Tensor) -> Tensor:
        """What belongs to the rows that run and to the others, as one batch."""
        whole = running.new_empty(len(self.rows) + len(self.left), *running.shape[1:])
        whole[self.rows], whole[self.left] = running, others
        return whole


class _CrossEntries:
    """Cross attention: entries are there since the prompt; layers read those of the rows under way."""

    def __init__(self, layers: list[Any]) -> None:
        self.all = layers
        self.rows: Tensor | None = None

    @property
    def layers(self) -> _CrossEntries:
        return self

    def __getitem__(self, layer: int) -> Any:
        entry = self.all[layer]
        return entry if self.rows is None else Entry(entry.keys, entry.values).of(self.rows)


def takes_apart(cache: Any) -> bool:
    """Whether the rows of a cache can be taken apart."""
    if not isinstance(cache, EncoderDecoderCache):
        return False
    entries = cache.self_attention_cache
    return not entries.offloading and all(type(layer) is DynamicLayer for layer in entries.layers)


def require_dynamic(cache: Any) -> None:
    """Refuse a cache whose layers do not grow row by row.

    Raises:
        UsageError: naming what came.
    """
    if not isinstance(cache, EncoderDecoderCache):
        raise UsageError(
            f"The cache is {type(cache).__name__}; early exit decodes over an EncoderDecoderCache, which `generate` "
            "makes by itself.",
            field="cache",
        )
    if not takes_apart(cache):
        entries = cache.self_attention_cache
        kinds = sorted({type(layer).__name__ for layer in entries.layers})
        raise UsageError(
            f"Early exit cannot decode over this cache ({', '.join(kinds)}{', offloaded' if entries.offloading else ''}): "
            "rows leave at different layers, so each layer's entries are written row by row. Leave cache_implementation "
            "out, or pass early_exit=False.",
            field="cache_implementation",
        )
