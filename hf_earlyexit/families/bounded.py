"""Packed rows as a graph sees them: how many there are and where they begin are values of the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from .attention import grid, places_of
from .base import Family, Frame
from .context import Part
from .packed import Packed


@dataclass(frozen=True)
class Bounded(Packed):
    """The context of rows that stand end to end in `[tokens, H]`, of which nothing is looked at on the host.

    It has bounds and a width, at least that of the longest row, and neither lengths nor runs. Rows may be empty, and tokens
    behind the last bound belong to none: a graph has a fixed size, and a batch fills a part.
    """

    def count(self, hidden: Tensor) -> int:
        return len(self.starts)

    def for_head(self, hidden: Tensor, one_token: bool) -> list[Part]:
        assert self.bounds is not None
        if one_token:
            return [Part(hidden[self.starts.clamp_max(len(hidden) - 1)][:, None])]
        places, real = grid(self.bounds, self.width, len(hidden))
        return [Part(hidden[places], real)]


def bounded_context(family: Family, model: Any, hidden: Tensor, bounds: Tensor, width: int) -> Bounded:
    """The context of the layers of a family that packs rows.

    Args:
        family: of the model.
        model: the stock backbone.
        hidden: `[tokens, H]`.
        bounds: position of each row's first token, and of the token behind the last row's `[B + 1]`.
        width: at least the tokens of the longest row.
    """
    context = Bounded(bounds=bounds, width=width)
    if not family.packed.frames:
        return context
    positions = places_of(bounds, len(hidden))[1][None] if family.keeps_positions else None
    framed = family.frame(Frame(model, hidden[None], None, positions, traced=True, packed=context))
    return replace(context, per_row=framed.per_row, shared=framed.shared, axes=framed.axes)
