"""Attention masks: as transformers prepares them, as a graph can trace them, or none where rows stand end to end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from .base import Frame, Framed

MASK = "attention_mask"


def both_ways(frame: Frame, window: int | None = None) -> Any:
    """The mask of layers that look both ways; with a window, no further than that many tokens."""
    if frame.packed is not None:
        return frame.packed
    if frame.traced:
        return _traced(frame, False, window)
    name = "create_bidirectional_mask" if window is None else "create_bidirectional_sliding_window_mask"
    return getattr(masking_utils, name)(
        config=frame.model.config, inputs_embeds=frame.hidden, attention_mask=frame.attention_mask
    )


def backwards(frame: Frame, window: int | None = None) -> Any:
    """The mask of layers that look at earlier tokens only; with a window, at fewer than that many."""
    if frame.packed is not None:
        return frame.packed
    if frame.traced:
        return _traced(frame, True, window)
    name = "create_causal_mask" if window is None else "create_sliding_window_causal_mask"
    places = positions(frame)
    # the fourth is the cache, which has another name in each release
    return getattr(masking_utils, name)(frame.model.config, frame.hidden, frame.attention_mask, None, position_ids=places)


def one_mask(frame: Frame) -> Framed:
    """What layers need that take a mask and nothing else: the context of most encoders."""
    mask = both_ways(frame)
    return framed(frame, {MASK: mask})


def framed(frame: Frame, masks: dict[str, Any], shared: dict[str, Any] | None = None, axes: Any = None) -> Framed:
    """A context's entries from masks and what else the layers need.

    Args:
        frame: what they were made from.
        masks: by name; `None` where nothing is masked.
        shared: the other entries; those that depend on positions are of rows where positions were given.
        axes: token axes of the others.
    """
    given = frame.position_ids is not None and frame.packed is None
    per_row, others = (masks | (shared or {}), {}) if given else (masks, shared or {})
    padded = frame.attention_mask is not None and frame.attention_mask.ndim == 2
    return Framed(
        per_row,
        others,
        {name: token_axes(mask) for name, mask in masks.items()} | (axes or {}),
        padded and any(mask is not None for mask in masks.values()),
    )


def token_axes(mask: Any) -> tuple[int, ...]:
    """Which axes of a mask count tokens: the second of `[B, T]`, the last two of `[B, 1, T, T]`."""
    if not isinstance(mask, Tensor):
        return ()
    return (1,) if mask.ndim == 2 else (2, 3)


def positions(frame: Frame) -> Tensor:
    """Positions `[B or 1, T]`: those that were given, or counted from 0."""
    if frame.position_ids is not None:
        return frame.position_ids
    return torch.arange(frame.hidden.shape[1], device=frame.hidden.device)[None]


def _traced(frame: Frame, causal: bool, window: int | None) -> Tensor | None:
    """A mask to add, `[B, 1, 1 or T, T]`, made without looking at any value; `where` would copy its numbers.

    `None` where no row can be padded, as of pictures: graphs of texts always have real tokens.
    """
    hidden, tokens = frame.hidden, frame.attention_mask
    lowest = torch.finfo(hidden.dtype).min
    if tokens is None:
        return None
    blocked = ~tokens.bool()[:, None, None]
    if causal or window is not None:
        place = torch.arange(hidden.shape[1], device=hidden.device)
        back = place[:, None] - place[None]
        if causal:
            blocked = blocked | (back < 0)
        if window is not None:
            blocked = blocked | (back >= window if causal else back.abs() > window)
    return torch.zeros_like(blocked, dtype=hidden.dtype).masked_fill(blocked, lowest)
