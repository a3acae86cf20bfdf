"""One decoding step's view of a cache: layers see the rows that are still under way, and every row gets its entry."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from ..errors import UsageError


class Entry(NamedTuple):
    """Keys and values, `[B, heads, T, d]`."""

    keys: Tensor
    values: Tensor


class TokenCache(EncoderDecoderCache):
    """What the layers are given as `past_key_values` while one token per row is decoded.

    Args:
        cache: of all rows; grows by one entry per row and layer.

    Raises:
        UsageError: for a cache whose rows cannot be taken apart.
    """

    def __init__(self, cache: EncoderDecoderCache) -> None:
        require_dynamic(cache)
        self.is_updated = cache.is_updated
        self.self_attention_cache = _OwnEntries(cache.self_attention_cache.layers)
        self.cross_attention_cache = _CrossEntries(cache.cross_attention_cache.layers)

    def keep(self, rows: Tensor) -> None:
        """Let the layers see these rows only, by their numbers in the whole batch."""
        self.self_attention_cache.rows = self.cross_attention_cache.rows = rows

    def fill(self, layer: int, entry: Entry, rows: Tensor, batch_size: int) -> None:
        """Give rows that will not run a layer (0-based) their entry of it."""
        self.self_attention_cache.fill(layer, entry, rows, batch_size)

    def close(self, layer: int) -> None:
        """Append the entries of a layer that no row runs any more."""
        self.self_attention_cache.close(layer)


class _OwnEntries:
    """Self attention: each layer appends one entry for every row, wherever it came from."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.rows: Tensor | None = None
        self._waiting: dict[int, Entry] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.rows is None:
            return self.layers[layer].update(keys, values)
        waiting = self._waiting.pop(layer)
        waiting.keys[self.rows], waiting.values[self.rows] = keys, values
        every_key, every_value = self.layers[layer].update(*waiting)
        return every_key[self.rows], every_value[self.rows]

    def fill(self, layer: int, entry: Entry, rows: Tensor, batch_size: int) -> None:
        if len(rows) == batch_size:
            self._waiting[layer] = entry
            return
        if layer not in self._waiting:
            self._waiting[layer] = Entry(*(part.new_empty(batch_size, *part.shape[1:]) for part in entry))
        for whole, part in zip(self._waiting[layer], entry, strict=True):
            whole[rows] = part

    def close(self, layer: int) -> None:
        self.layers[layer].update(*self._waiting.pop(layer))


class _CrossEntries:
    """Cross attention: entries are there since the prompt; layers read those of the rows under way."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self.rows: Tensor | None = None

    @property
    def layers(self) -> _CrossEntries:
        return self

    def __getitem__(self, layer: int) -> Any:
        entry = self._layers[layer]
        return entry if self.rows is None else Entry(entry.keys[self.rows], entry.values[self.rows])


def require_dynamic(cache: Any) -> None:
    """Refuse a cache whose layers do not grow row by row.

    Raises:
        UsageError: naming what came.
    """
    if not isinstance(cache, EncoderDecoderCache):
        raise UsageError(
            f"past_key_values is {type(cache).__name__}; early exit decodes over an EncoderDecoderCache, which `generate` "
            "makes by itself.",
            field="past_key_values",
        )
    own = cache.self_attention_cache
    if own.offloading or any(type(layer) is not DynamicLayer for layer in own.layers):
        kinds = sorted({type(layer).__name__ for layer in own.layers})
        raise UsageError(
            f"Early exit cannot decode over this cache ({', '.join(kinds)}{', offloaded' if own.offloading else ''}): rows "
            "leave at different layers, so each layer's entries are written row by row. Leave cache_implementation out, or "
            "pass early_exit=False.",
            field="cache_implementation",
        )
