"""Rows end to end without padding: `[tokens, H]`, so that no layer works on tokens that are not there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import Context


@dataclass(frozen=True)
class Packed(Context):
    """The context of rows that stand end to end in hidden states `[tokens, H]`.

    Attributes:
        starts: position of each row's first token `[B]`.
        runs: neighbours of equal length, as (rows, length); each run is one call of attention, without a mask.
        real: True at tokens that may be attended to `[tokens]`; `None` if all may.
    """

    lengths: tuple[int, ...] = ()
    starts: Tensor | None = None
    runs: tuple[tuple[int, int], ...] = ()
    real: Tensor | None = None

    @classmethod
    def of(cls, lengths: tuple[int, ...], real: Tensor | None, device: torch.device) -> Packed:
        """The context of rows of these lengths."""
        starts = torch.tensor([0, *accumulate(lengths[:-1])], device=device)
        runs = tuple((sum(1 for _ in run), length) for length, run in groupby(lengths))
        return cls(None, None, lengths, starts=starts, runs=runs, real=real)

    def count(self, hidden: Tensor) -> int:
        return len(self.lengths)

    def take(self, hidden: Tensor, rows: Sequence[int], index: Tensor) -> tuple[Tensor, Packed]:
        lengths = tuple(self.lengths[row] for row in rows)
        sizes = list(self.lengths)
        parts, real = torch.split(hidden, sizes), None if self.real is None else torch.split(self.real, sizes)
        return torch.cat([parts[row] for row in rows]), Packed.of(
            lengths, None if real is None else torch.cat([real[row] for row in rows]), hidden.device
        )

    def for_head(self, hidden: Tensor, first_token: bool) -> list[tuple[Tensor, Tensor | None]]:
        if first_token:
            return [(hidden[self.starts][:, None], None)]
        parts = []
        for start, stop, rows, length in self._spans():
            real = None if self.real is None else self.real[start:stop].view(rows, length)
            parts.append((hidden[start:stop].view(rows, length, -1), real))
        return parts

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of every row to itself, `[tokens, heads, D]` to `[tokens, heads * D]`."""
        mixed = []
        for start, stop, rows, length in self._spans():
            q, k, v = (part[start:stop].view(rows, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
            mask = None if self.real is None else self.real[start:stop].view(rows, 1, 1, length)
            run = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            mixed.append(run.transpose(1, 2).reshape(rows * length, -1))
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed)

    def _spans(self) -> Iterator[tuple[int, int, int, int]]:
        """For each run its first token, the token after its last, its rows and their length."""
        start = 0
        for rows, length in self.runs:
            yield start, start + rows * length, rows, length
            start += rows * length


def pack(shape: tuple[int, int], mask: Tensor | None, device: torch.device) -> tuple[Tensor | None, Packed]:
    """How to pack padded rows.

    Args:
        shape: rows and padded tokens `(B, T)`.
        mask: 0 or False at padding `[B, T]`; `None` if no row is padded.
        device: of the hidden states.

    Returns:
        Positions of the packed tokens in `[B * T]`, `None` if all of them stay, and the context.
    """
    rows, width = shape
    if mask is None:
        return None, Packed.of((width,) * rows, None, device)
    real = mask.bool()
    lengths = row_lengths(real)
    if min(lengths) == width:
        tokens, real = None, real.flatten()
    else:
        tokens = _tokens(torch.arange(0, rows * width, width, device=device), lengths)
        real = real.flatten()[tokens]
    return tokens, Packed.of(lengths, None if bool(real.all()) else real, device)  # a row may be masked within


def row_lengths(tokens: Tensor) -> tuple[int, ...]:
    """Position after the last real token of each row of `[B, T]`; the full width for a row without any."""
    width = tokens.shape[1]
    return tuple((width - tokens.flip(1).int().argmax(1)).tolist())


def join(parts: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Packed]:
    """Packed batches as one."""
    hidden = torch.cat([hidden for hidden, _ in parts])
    real = None
    if any(context.real is not None for _, context in parts):
        real = torch.cat([h.new_ones(len(h), dtype=torch.bool) if c.real is None else c.real for h, c in parts])
    return hidden, Packed.of(tuple(length for _, context in parts for length in context.lengths), real, hidden.device)


def _tokens(starts: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Positions of all tokens of rows that begin at `starts`."""
    size = torch.tensor(lengths, device=starts.device)
    shift = starts - size.cumsum(0) + size
    return shift.repeat_interleave(size, output_size=sum(lengths)) + torch.arange(sum(lengths), device=starts.device)
