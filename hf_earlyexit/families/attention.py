"""Attention of rows that stand end to end, all in one call, from bounds that may be known to the device alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn

WIDEST_HEAD = 256  # of the kernels behind `varlen_attn`, which compute in half precision only


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    width: int,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Tensor:
    """Attention of every row to itself, `[tokens, heads, D]` to `[tokens, heads * D]`, whatever the device.

    In half precision on CUDA rows of all lengths are one call of a kernel for such rows. Elsewhere queries, keys and values
    are padded for the products, and for nothing else.

    Args:
        query, key, value: of all rows; tokens behind the last bound belong to no row, and what they get means nothing.
        bounds: position of each row's first token, and of the token behind the last row's `[B + 1]`; rows may be empty.
        width: at least the tokens of the longest row.
        scale: of the products; `D ** -0.5` by default.
        causal: look at earlier tokens only.
        window: look at fewer than that many tokens in a direction.
    """
    if _has_kernel(query):
        ends, reach = bounds.int(), -1 if window is None else window - 1
        sides = (reach, 0 if causal else reach)
        # in one split, so that sums of a row are in the same order in every company
        mixed = varlen_attn(query, key, value, ends, ends, width, width, scale=scale, window_size=sides, num_splits=1)
        assert isinstance(mixed, Tensor)  # nothing else was asked for
        return mixed.flatten(1)
    places, real = grid(bounds, width, len(query))
    q, k, v = (part[places].transpose(1, 2) for part in (query, key, value))
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=_mask(real, q.dtype, causal, window), scale=scale)
    rows, columns = places_of(bounds, len(query))
    return out.transpose(1, 2).flatten(2)[rows, columns.clamp_max(width - 1)]


def _has_kernel(query: Tensor) -> bool:
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] <= WIDEST_HEAD


def grid(bounds: Tensor, width: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Rows side by side: the place of each of their tokens, and whether there is one, both `[B, width]`."""
    column = torch.arange(width, device=bounds.device)
    places = (bounds[:-1, None] + column).clamp_max(tokens - 1)
    return places, column < (bounds[1:] - bounds[:-1])[:, None]


def places_of(bounds: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Each token's row and its place there, both `[tokens]`; tokens behind the last bound count as the last row's."""
    place = torch.arange(tokens, device=bounds.device)
    rows = torch.searchsorted(bounds[1:], place, right=True).clamp_max(len(bounds) - 2)
    return rows, place - bounds[rows]


def _mask(real: Tensor, dtype: torch.dtype, causal: bool, window: int | None) -> Tensor:
    """What is added to the products, `[B, 1, 1 or T, T]`; a row without tokens sees its first place, not nothing."""
    column = torch.arange(real.shape[1], device=real.device)
    blocked = ~(real | (column < 1))[:, None, None]
    if causal or window is not None:
        back = column[:, None] - column
        if causal:
            blocked = blocked | (back < 0)
        if window is not None:
            blocked = blocked | (back.abs() >= window)
    return torch.zeros_like(blocked, dtype=dtype).masked_fill(blocked, torch.finfo(dtype).min)
