"""Rows end to end without padding: `[tokens, H]`, so that no layer works on tokens that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..transfer import Index, chosen, placed
from .attention import attend_at_once
from .context import Context, Part, each, filled, join_kept, row_lengths


@dataclass(frozen=True)
class Packed(Context):
    """The context of rows that stand end to end in hidden states `[tokens, H]`.

    In `per_row` every mask is the packed context itself; tensors in `shared` have a token axis for all rows' tokens, and
    `kept["answering"]` counts from each row's first token.

    Attributes:
        bounds: position of each row's first token, and of the token behind the last row's `[B + 1]`.
        runs: neighbours of equal length, as (rows, length); each run is one call of attention, without a mask.
        real: True at tokens that may be attended to `[tokens]`; `None` if all may.
        width: tokens of the longest row.
    """

    least_rows: ClassVar[int] = 4  # products of fewer rows are summed in another order, and a row would see its company

    lengths: tuple[int, ...] = ()
    bounds: Tensor | None = None
    runs: tuple[tuple[int, int], ...] = ()
    real: Tensor | None = None
    width: int = 0

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        real: Tensor | None,
        device: torch.device,
        kept: dict[str, Tensor] | None = None,
        bounds: Tensor | None = None,
    ) -> Packed:
        """The context of rows of these lengths; bounds that are on the device already need not be brought there."""
        bounds = placed(torch.tensor([0, *accumulate(lengths)]), device) if bounds is None else bounds
        runs = tuple((sum(1 for _ in run), length) for length, run in groupby(lengths))
        return cls(lengths=lengths, kept=kept or {}, bounds=bounds, runs=runs, real=real, width=max(lengths))

    @property
    def starts(self) -> Tensor:
        """Position of each row's first token `[B]`."""
        assert self.bounds is not None
        return self.bounds[:-1]

    @cached_property
    def answers(self) -> Tensor:
        """Position of the token that answers for each row, at least `least_rows` of them: the last one is repeated."""
        answering = self.kept.get("answering")
        return filled(self.starts if answering is None else self.starts + answering, self.least_rows)

    def count(self, hidden: Tensor) -> int:
        return len(self.lengths)

    def take(self, hidden: Tensor, rows: Sequence[int], index: Index) -> tuple[Tensor, Packed]:
        lengths, bounds, tokens = tuple(self.lengths[row] for row in rows), None, self._tokens_of(rows, index)
        if isinstance(tokens, slice) and tokens.start == 0 and self.bounds is not None:
            bounds = self.bounds[: len(rows) + 1]
        real = None if self.real is None else chosen(self.real, tokens)
        kept = {name: chosen(value, index) for name, value in self.kept.items()}
        return chosen(hidden, tokens), self._with_shared(Packed.of(lengths, real, hidden.device, kept, bounds), tokens)

    def moved(self, hidden: Tensor, rows: Sequence[int], index: Tensor, bounds: Tensor) -> Packed:
        """The context of the same rows in another order; no row is masked within.

        Args:
            hidden: in the new order.
            rows: where each row was, on the host.
            index: the same on the device `[B]`.
            bounds: in the new order, on the device `[B + 1]`.
        """
        kept = {name: chosen(value, index) for name, value in self.kept.items()}
        new = Packed.of(tuple(self.lengths[row] for row in rows), None, hidden.device, kept, bounds)
        if not self.shared:
            return new
        return self._with_shared(new, _tokens(chosen(self.starts, index), bounds.diff(), len(hidden)))

    def _tokens_of(self, rows: Sequence[int], index: Index) -> Index:
        """Positions of all tokens of some rows."""
        if isinstance(index, slice):
            start = sum(self.lengths[: index.start])
            return slice(start, start + sum(self.lengths[index]))
        return _tokens_of_lengths(chosen(self.starts, index), tuple(self.lengths[row] for row in rows))

    def _with_shared(self, new: Packed, tokens: Index) -> Packed:
        """A context of some of the tokens, with what is shared of them."""
        if not (self.per_row or self.shared):
            return new
        shared = {name: self._along(name, value, lambda part: chosen(part, tokens)) for name, value in self.shared.items()}
        return replace(new, per_row=dict.fromkeys(self.per_row, new), shared=shared, axes=self.axes)

    def _along(self, name: str, value: Any, change: Any) -> Any:
        """Change a shared value along its token axis, if it has one."""
        axes = self.axes.get(name, ())

        def changed(part: Tensor) -> Tensor:
            moved: Tensor = change(part.movedim(axes[0], 0))
            return moved.movedim(0, axes[0])

        return each(value, changed) if axes else value

    def for_head(self, hidden: Tensor, one_token: bool) -> list[Part]:
        if one_token:
            return [Part(hidden.index_select(0, self.answers).unsqueeze(1))]
        answering, parts, first = self.kept.get("answering"), [], 0
        for start, stop, rows, length in self._spans():
            real = None if self.real is None else self.real[start:stop].view(rows, length)
            places = None if answering is None else answering[first : first + rows]
            parts.append(Part(hidden[start:stop].view(rows, length, -1), real, places))
            first += rows
        return parts

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
    ) -> Tensor:
        """Attention of every row to itself, `[tokens, heads, D]` to `[tokens, heads * D]`.

        Args:
            query, key, value: of all rows.
            scale: of the products; `D ** -0.5` by default.
            causal: look at earlier tokens only.
            window: look at fewer than that many tokens in a direction.
        """
        if not self.runs or (query.is_cuda and self.real is None):  # where runs would be a launch each
            assert self.bounds is not None
            return attend_at_once(query, key, value, self.bounds, self.width, scale, causal, window)
        mixed = []
        for start, stop, rows, length in self._spans():
            q, k, v = (part[start:stop].view(rows, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
            mask = None if self.real is None else self.real[start:stop].view(rows, 1, 1, length)
            near = None if window is None or length <= window else _near(length, window, causal, query.device)
            if causal and near is None and mask is not None:
                near = _near(length, length, True, query.device)
            mask = near if mask is None else mask if near is None else mask & near
            run = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None and length > 1, scale=scale
            )
            mixed.append(run.transpose(1, 2).reshape(rows * length, -1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _spans(self) -> Iterator[tuple[int, int, int, int]]:
        """For each run its first token, the token after its last, its rows and their length."""
        start = 0
        for rows, length in self.runs:
            yield start, start + rows * length, rows, length
            start += rows * length


def _near(length: int, window: int, causal: bool, device: torch.device) -> Tensor:
    """True where a token may look at another `[T, T]`."""
    place = torch.arange(length, device=device)
    back = place[:, None] - place[None]
    return (back >= 0) & (back < window) if causal else back.abs() < window


def pack(
    shape: tuple[int, int], mask: Tensor | None, device: torch.device, answering: Tensor | None = None, front: bool = True
) -> tuple[Tensor | None, Packed]:
    """How to pack padded rows.

    Args:
        shape: rows and padded tokens `(B, T)`.
        mask: 0 or False at padding `[B, T]`, best on the host, as it is looked at; `None` if no row is padded.
        device: of the hidden states.
        answering: place of the token that answers for each row `[B]`, where the mask is, which must stay; `None` where it is
            the first.
        front: keep masked tokens at the front of a row.

    Returns:
        Positions of the packed tokens in `[B * T]`, where the mask is, `None` if all of them stay; and the context.
    """
    rows, width = shape
    kept = {} if answering is None else {"answering": answering}
    if mask is None:
        return None, Packed.of((width,) * rows, None, device, {name: placed(place, device) for name, place in kept.items()})
    real = mask.bool()
    lengths = row_lengths(real, answering)
    starts = torch.arange(0, rows * width, width, device=mask.device)
    if not front:
        first = real.int().argmax(1) if answering is None else torch.minimum(real.int().argmax(1), answering)
        lengths = tuple(length - skipped for length, skipped in zip(lengths, first.tolist(), strict=True))
        starts = starts + first
        kept = {name: place - first for name, place in kept.items()}
    if min(lengths) == width:
        tokens, real = None, real.flatten()
    else:
        tokens = _tokens_of_lengths(starts, lengths)
        real = real.flatten()[tokens]
    kept = {name: placed(place, device) for name, place in kept.items()}
    within = None if bool(real.all()) else placed(real, device)  # a row may be masked within
    return tokens, Packed.of(lengths, within, device, kept)


def join(parts: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Packed]:
    """Packed batches as one."""
    hidden = torch.cat([hidden for hidden, _ in parts])
    real = None
    if any(context.real is not None for _, context in parts):
        real = torch.cat([h.new_ones(len(h), dtype=torch.bool) if c.real is None else c.real for h, c in parts])
    lengths = tuple(length for _, context in parts for length in context.lengths)
    new = Packed.of(lengths, real, hidden.device, join_kept(parts, 0))
    first = parts[0][1]
    if first.per_row or first.shared:
        shared = {name: _together([c.shared[name] for _, c in parts], first.axes.get(name, ())) for name in first.shared}
        new = replace(new, per_row=dict.fromkeys(first.per_row, new), shared=shared, axes=first.axes)
    return hidden, new


def _together(values: list[Any], axes: tuple[int, ...]) -> Any:
    if not axes:
        return values[0]
    if isinstance(values[0], tuple):
        return tuple(torch.cat(parts, axes[0]) for parts in zip(*values, strict=True))
    return torch.cat(values, axes[0])


def _tokens_of_lengths(starts: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Positions of all tokens of rows that begin at `starts`."""
    return _tokens(starts, placed(torch.tensor(lengths), starts.device), sum(lengths))


def _tokens(starts: Tensor, size: Tensor, total: int) -> Tensor:
    """The same of rows whose lengths are on the device `[B]`, and so many in all."""
    shift = starts - size.cumsum(0) + size
    return shift.repeat_interleave(size, output_size=total) + torch.arange(total, device=starts.device)
