"""One decoding step's view of a cache: layers see the rows that are still under way, and every row gets its entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import UsageError

Project = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor]]
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)


class Entry(NamedTuple):
    """Keys and values, `[B, heads, T, d]`."""

    keys: Tensor
    values: Tensor

    def of(self, rows: Tensor) -> Entry:
        """Those of some rows of the batch."""
        return Entry(self.keys.index_select(0, rows), self.values.index_select(0, rows))


class OwnEntries:
    """Self attention: each layer appends one entry for every row, run or not.

    Args:
        layers: of the cache of all rows.
        project: makes the entry that a layer (1-based) has of states `[R, 1, H]` that do not run it, and that belong to
            these rows of the batch; to all where that is `None`.
    """

    is_compileable = False

    def __init__(self, layers: list[Any], project: Project) -> None:
        self.layers, self.project = layers, project
        self.rows: Tensor | None = None

    def keep(self, rows: Tensor, left: Tensor, states: Tensor) -> None:
        """Let the layers see some rows only.

        Args:
            rows: numbers of those rows in the whole batch.
            left: numbers of the others.
            states: what the others left with `[left, 1, H]`.
        """
        self.rows, self.left, self.states = rows, left, states

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Entry:
        """As a cache of transformers does it, for the rows that the layers see."""
        entry = self.append(layer, keys, values)
        return entry if self.rows is None else entry.of(self.rows)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> Entry:
        """Append the entries of layer `layer` (0-based), as `update` does.

        Args:
            layer: counted as in transformers' caches.
            keys, values: of the rows that the layers see.

        Returns:
            The entries of all rows of the batch so far.
        """
        new = Entry(keys, values)
        if self.rows is not None:
            new = Entry(*map(self._together, new, self.project(layer + 1, self.states, self.left)))
        return Entry(*self.layers[layer].update(*new))

    def close(self, layer: int, states: Tensor) -> None:
        """Append the entries of a layer (1-based) that no row runs, from the states of all rows `[B, 1, H]`."""
        self.layers[layer - 1].update(*self.project(layer, states, None))

    def _together(self, running: Tensor, others: Tensor) -> Tensor:
        """What belongs to the rows that run and to the others, as one batch."""
        whole = running.new_empty(len(self.rows) + len(self.left), *running.shape[1:])  # type: ignore[arg-type]
        whole[self.rows], whole[self.left] = running, others
        return whole


class CrossedCache(EncoderDecoderCache):
    """A view of a cache whose layers look at an encoder's states too.

    Args:
        cache: that is viewed.
        attended: stands in for its self attention.
    """

    cross_attention_cache: CrossEntries  # type: ignore[assignment]

    def __init__(self, cache: EncoderDecoderCache, attended: Any) -> None:
        self.is_updated = cache.is_updated
        self.self_attention_cache = attended
        self.cross_attention_cache = CrossEntries(cache.cross_attention_cache.layers)
        self.append = attended.append

    def of_images(self, layer: int) -> Entry:
        """Entries of the images of all rows of the batch, in layer `layer` (0-based)."""
        entry = self.cross_attention_cache.all[layer]
        return Entry(entry.keys, entry.values)


class CrossedEntries(CrossedCache):
    """`OwnEntries`, where the layers look at an encoder's states too."""

    self_attention_cache: OwnEntries  # type: ignore[assignment]

    def __init__(self, cache: EncoderDecoderCache, project: Project) -> None:
        super().__init__(cache, OwnEntries(cache.self_attention_cache.layers, project))
        self.close = self.self_attention_cache.close

    def keep(self, rows: Tensor, left: Tensor, states: Tensor) -> None:
        """As in `OwnEntries`."""
        self.self_attention_cache.keep(rows, left, states)
        self.cross_attention_cache.rows = rows


class CrossEntries:
    """Cross attention: entries are there since the prompt; layers read those of the rows under way."""

    def __init__(self, layers: list[Any]) -> None:
        self.all = layers
        self.rows: Tensor | None = None

    @property
    def layers(self) -> CrossEntries:
        return self

    def __getitem__(self, layer: int) -> Any:
        entry = self.all[layer]
        return entry if self.rows is None else Entry(entry.keys, entry.values).of(self.rows)


def token_cache(cache: Any, project: Project) -> OwnEntries | CrossedEntries:
    """The cache that the layers are given while one token per row is decoded.

    Args:
        cache: of all rows; grows by one entry per row and layer.
        project: as in `OwnEntries`.

    Raises:
        UsageError: for a cache whose rows cannot be taken apart.
    """
    require_dynamic(cache, isinstance(cache, EncoderDecoderCache))
    return CrossedEntries(cache, project) if isinstance(cache, EncoderDecoderCache) else OwnEntries(cache.layers, project)


def self_attention_of(cache: Any) -> Any:
    """The cache of self attention."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def takes_apart(cache: Any, crosses: bool) -> bool:
    """Whether the rows of a cache can be taken apart, and it is of the kind that the layers need.

    Args:
        cache: any.
        crosses: whether the layers look at an encoder's states.
    """
    if isinstance(cache, EncoderDecoderCache) != crosses:
        return False
    attended = self_attention_of(cache)
    if not isinstance(attended, DynamicCache):
        return False
    return not attended.offloading and all(type(layer) in GROWING for layer in attended.layers)


def require_dynamic(cache: Any, crosses: bool) -> None:
    """Refuse a cache whose layers do not grow row by row.

    Args:
        cache: any.
        crosses: whether the layers look at an encoder's states.

    Raises:
        UsageError: naming what came.
    """
    wanted = EncoderDecoderCache if crosses else DynamicCache
    if not isinstance(cache, wanted) and (crosses or not hasattr(cache, "layers")):
        raise UsageError(
            f"The cache is {type(cache).__name__}; early exit decodes over {'an' if crosses else 'a'} {wanted.__name__}, "
            "which `generate` makes by itself.",
            field="cache",
        )
    if not takes_apart(cache, crosses):
        attended = self_attention_of(cache)
        kinds = sorted({type(layer).__name__ for layer in attended.layers}) or [type(attended).__name__]
        offloaded = ", offloaded" if getattr(attended, "offloading", False) else ""
        raise UsageError(
            f"Early exit cannot decode over this cache ({', '.join(kinds)}{offloaded}): rows "
            "leave at different layers, so each layer's entries are written row by row. Leave cache_implementation out, or "
            "pass early_exit=False.",
            field="cache_implementation",
        )


def require_prompt(cache: Any, labels: Any, caches: bool, begun: bool, crosses: bool) -> None:
    """Refuse passes that run in full although a policy lets tokens leave; only the prompt's may, before any token's.

    Args:
        cache: of the call, or `None`.
        labels: of the call, or `None`.
        caches: whether the pass leaves a cache to go on with.
        begun: whether the prompt is over, or may not be what comes.
        crosses: whether the layers look at an encoder's states.
    """
    if labels is not None:
        raise _in_full("labels are compared with a whole text")
    if not caches:
        raise _in_full("use_cache is False")
    if cache is not None and cache.get_seq_length() > 0:
        require_dynamic(cache, crosses)
        if crosses or begun:
            missing = ", or one whose images are missing" if crosses else ""
            raise _in_full(f"several tokens at once go on from a cache{missing}")
    elif begun:
        raise _in_full("there is no cache that holds a prompt")


def holds_prompt(cache: Any, layers: int) -> bool:
    """Whether a prompt has run through every layer, cross attention included."""
    if cache is None or cache.get_seq_length() == 0:
        return False
    updated = getattr(cache, "is_updated", None)
    return updated is None or all(updated.get(layer) for layer in range(layers))


def _in_full(why: str) -> UsageError:
    return UsageError(
        f"No token can leave early here: {why}. Tokens leave where they are decoded one by one over a cache that holds the "
        "prompt, as `generate` does it; pass early_exit=False to run in full.",
        field="early_exit",
    )
