"""Keys and values of rows that are at different places in their texts, and of tokens at different depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import EncoderDecoderCache

from .token_cache import CrossedCache, Entry, require_dynamic, self_attention_of

ROOM = 64  # columns that are added at a time


class DraftEntries:
    """Self attention: the token in column c of a row has its entry in column c of every layer that it has run.

    A token is rolled back by writing another one into its column: nobody looks at a column before its token has run the
    layer, and no token looks at columns after its own.

    Args:
        layers: of a cache that holds the prompts `[B, heads, P, d]`.
        width: P; of layers with a window only the last of these columns are there.
    """

    is_compileable = False

    def __init__(self, layers: Sequence[Any], width: int) -> None:
        self.entries = [_with_room(layer.keys, layer.values, width) for layer in layers]
        self.rows: Tensor | None = None  # all, or their numbers

    def look(self, rows: Tensor, columns: Tensor, first: int | None, width: int) -> None:
        """Tell whose tokens the next calls of `append` bring.

        Args:
            rows: their numbers `[R]`, ascending.
            columns: where their tokens stand `[R, N]`.
            first: the column of the first token, where it is that of all rows.
            width: columns that the tokens may look at, from 0 on.
        """
        self.index, self.columns, self.first, self.width = rows, columns, first, width
        self.rows = None if len(rows) == len(self.entries[0].keys) else rows

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Entry:
        """Write the entries of some rows' tokens `[R, heads, N, d]` in layer `layer` (0-based).

        Returns:
            The entries of all rows of the batch so far.
        """
        stored = self.entries[layer]
        if stored.keys.shape[2] < self.width:
            stored = self.entries[layer] = _with_room(*stored, stored.keys.shape[2], self.width)
        for kept, new in zip(stored, (keys, values), strict=True):
            if self.rows is None and self.first is not None:
                kept[:, :, self.first : self.first + new.shape[2]] = new
            else:
                kept[self.index[:, None], :, self.columns] = new.transpose(1, 2)
        return Entry(stored.keys[:, :, : self.width], stored.values[:, :, : self.width])

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Entry:
        """As a cache of transformers does it, for the rows that the layers see."""
        entry = self.append(layer, keys, values)
        return entry if self.rows is None else entry.of(self.rows)

    def write_back(self, layers: Sequence[Any], ends: Sequence[int]) -> None:
        """Put the entries into the layers of a cache, as it would hold them; zeros after a row's end.

        Args:
            layers: of the cache that held the prompts.
            ends: columns of each row that have run every layer.
        """
        width = max(ends)
        for layer, stored in zip(layers, self.entries, strict=True):
            for row, end in enumerate(ends):
                for part in stored:
                    part[row, :, end:] = 0
            start = max(0, width - layer.sliding_window + 1) if layer.is_sliding else 0
            layer.keys, layer.values = (part[:, :, start:width].clone() for part in stored)
            if layer.is_sliding:
                layer.cumulative_length = width


class CrossedDraftEntries(CrossedCache):
    """`DraftEntries`, where the layers look at an encoder's states too.

    Args:
        cache: that holds the prompts.
        width: as in `DraftEntries`.
    """

    self_attention_cache: DraftEntries  # type: ignore[assignment]

    def __init__(self, cache: EncoderDecoderCache, width: int) -> None:
        super().__init__(cache, DraftEntries(cache.self_attention_cache.layers, width))
        self.entries = self.self_attention_cache.entries
        self.write_back = self.self_attention_cache.write_back

    def look(self, rows: Tensor, columns: Tensor, first: int | None, width: int) -> None:
        """As in `DraftEntries`."""
        self.self_attention_cache.look(rows, columns, first, width)
        self.cross_attention_cache.rows = self.self_attention_cache.rows


def draft_cache(cache: Any) -> DraftEntries | CrossedDraftEntries:
    """A cache whose rows may be at different places, from one that holds the prompts.

    Raises:
        UsageError: for a cache whose entries cannot be taken apart, and so cannot be rolled back.
    """
    crosses = isinstance(cache, EncoderDecoderCache)
    require_dynamic(cache, crosses)
    if crosses:
        return CrossedDraftEntries(cache, cache.get_seq_length())
    return DraftEntries(self_attention_of(cache).layers, cache.get_seq_length())


def _with_room(keys: Tensor, values: Tensor, width: int, wanted: int = 0) -> Entry:
    """Entries with room for more columns; those that are there are the last of `width`."""

    def widened(part: Tensor) -> Tensor:
        new = part.new_zeros(*part.shape[:2], max(width, wanted) + ROOM, part.shape[3])
        new[:, :, width - part.shape[2] : width] = part
        return new

    return Entry(widened(keys), widened(values))
