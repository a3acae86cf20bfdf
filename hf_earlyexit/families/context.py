"""What the layers of one call need, sorted into what belongs to rows and what is the same for all of them.

So rows can be dropped and joined without knowing what any of it means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..transfer import Index, chosen


def filled(values: Tensor, least: int) -> Tensor:
    """`[B, ...]` with at least so many rows: the last one is repeated. 0 leaves sizes unread, as tracing wants it."""
    missing = least - values.shape[0] if least else 0
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])]) if missing > 0 else values


class Part(NamedTuple):
    """What a head reads of some rows.

    Attributes:
        hidden: `[B, T, H]`; of one token a row where that is enough, `[B, 1, H]`.
        tokens: True at real tokens `[B, T]`; `None` if no row is padded.
        answering: place of the token that answers for the row `[B]`; `None` where it is the first of `hidden`.
    """

    hidden: Tensor
    tokens: Tensor | None = None
    answering: Tensor | None = None

    def filled(self, least: int) -> Part:
        """At least so many rows: the last one is repeated."""
        if not least or self.hidden.shape[0] >= least:
            return self
        return Part(*(None if one is None else filled(one, least) for one in self))  # type: ignore[arg-type]

    @property
    def state(self) -> Tensor:
        """The state of the token that answers `[B, H]`."""
        if self.answering is None:
            return self.hidden[:, 0]
        return self.hidden[torch.arange(len(self.hidden), device=self.hidden.device), self.answering]

    @property
    def mean(self) -> Tensor:
        """The mean state of the real tokens `[B, H]`."""
        if self.tokens is None:
            return self.hidden.mean(1)
        real = self.tokens.to(self.hidden.dtype)
        return torch.einsum("bth,bt->bh", self.hidden, real) / real.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class Context:
    """What every layer of one call needs besides the hidden states `[B, T, H]`.

    Attributes:
        per_row: values with the rows first, or `None`: masks, biases, rotary embeddings of positions that were given.
        shared: values that are the same for all rows.
        axes: which axes of those values are token axes, by name; no entry for those that have none.
        tokens: True at real tokens `[B, T]`; `None` if no row is padded.
        lengths: on the host, tokens of each row that must stay; `None` if no row is padded.
        kept: what belongs to the rows wherever they go, `[B]` or `[B, T]`: `position_ids` that were given, and the place of
            the token that answers, `answering`.
        options: keyword arguments for every layer.
        attentions: gets the attention of every layer, of families that transformers does not watch; `None` if nobody asks.
        least_rows: that a head is given at once; fewer are filled up.
    """

    least_rows: ClassVar[int] = 0

    per_row: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    attentions: list[Tensor] | None = None

    def __getitem__(self, name: str) -> Any:
        """An entry, whether it belongs to rows or to all."""
        return self.per_row[name] if name in self.per_row else self.shared[name]

    def noted(self, after: tuple[Any, ...]) -> Tensor:
        """The hidden states of a layer that returns its attention beside them, which is noted where somebody asks."""
        if self.attentions is not None:
            self.attentions.append(after[1])
        hidden: Tensor = after[0]
        return hidden

    def count(self, hidden: Tensor) -> int:
        """Rows."""
        return hidden.shape[0]

    def for_head(self, hidden: Tensor, one_token: bool) -> list[Part]:
        """What a head reads, in parts that make up all rows in order. A single part may be filled up to `least_rows`.

        Args:
            hidden: of these rows.
            one_token: whether the token that answers is enough.
        """
        answering = self.kept.get("answering")
        if not one_token:
            return [Part(hidden, self.tokens, answering)]
        return [Part(hidden[:, :1] if answering is None else Part(hidden, None, answering).state[:, None])]

    def take(self, hidden: Tensor, rows: Sequence[int], index: Index) -> tuple[Tensor, Context]:
        """Keep some rows and cut the columns that are padding for all of them.

        Args:
            hidden: `[B, T, H]`.
            rows: their positions, on the host.
            index: the same positions, on the device, as `index_of` gives them.
        """
        hidden = chosen(hidden, index)
        per_row = {name: each(value, lambda part: chosen(part, index)) for name, value in self.per_row.items()}
        kept = {name: chosen(value, index) for name, value in self.kept.items()}
        taken = replace(self, per_row=per_row, kept=kept)
        if self.tokens is None or self.lengths is None:
            return hidden, taken
        lengths = tuple(self.lengths[row] for row in rows)
        taken = replace(taken, tokens=chosen(self.tokens, index), lengths=lengths)
        width = max(lengths)
        return (hidden, taken) if width == hidden.shape[1] else (hidden[:, :width], taken.trim(width))

    def trim(self, width: int) -> Context:
        """Without the columns from `width` on."""

        def cut(values: dict[str, Any]) -> dict[str, Any]:
            return {name: _narrow(value, self.axes.get(name, ()), width) for name, value in values.items()}

        tokens = None if self.tokens is None else self.tokens[:, :width]
        kept = {name: value[:, :width] if value.ndim == 2 else value for name, value in self.kept.items()}
        return replace(self, per_row=cut(self.per_row), shared=cut(self.shared), tokens=tokens, kept=kept)


def row_lengths(tokens: Tensor, answering: Tensor | None = None) -> tuple[int, ...]:
    """Position after the last token of each row of `[B, T]` that is real or answers; the full width if no token is real."""
    width = tokens.shape[1]
    lengths = width - tokens.flip(1).int().argmax(1)
    return tuple((lengths if answering is None else torch.maximum(lengths, answering + 1)).tolist())


def widened(values: Tensor, width: int) -> Tensor:
    """`[B, T, ...]` with zeros up to `width`."""
    missing = width - values.shape[1]
    return torch.cat([values, values.new_zeros(values.shape[0], missing, *values.shape[2:])], 1) if missing else values


def join_kept(parts: Sequence[tuple[Any, Context]], width: int) -> dict[str, Tensor]:
    """What belongs to the rows of several batches, as one."""
    names = parts[0][1].kept
    values = {name: [context.kept[name] for _, context in parts] for name in names}
    return {name: torch.cat([widened(v, width) if v.ndim == 2 else v for v in given]) for name, given in values.items()}


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change a tensor, or each of a tuple of tensors; `None` stays."""
    if value is None:
        return None
    return tuple(map(change, value)) if isinstance(value, tuple) else change(value)


def _narrow(value: Any, axes: tuple[int, ...], width: int) -> Any:
    def narrowed(part: Tensor) -> Tensor:
        for axis in axes:
            part = part.narrow(axis, 0, width) if part.shape[axis] > width else part
        return part

    return each(value, narrowed) if axes else value
