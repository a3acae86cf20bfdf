"""A GPT-2 layer run by its parts: on a CPU, what stands around the products of a small layer costs as much as they do."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.pytorch_utils import Conv1D

from .base import is_watched

if TYPE_CHECKING:
    from .decoders import TokenContext


def is_plain(layer: Any) -> bool:
    """Whether a GPT-2 layer is the stock one with plain attention, and so are its parts, and nobody watches any of them."""
    if type(layer) is not GPT2Block or layer.training or layer.attn.config._attn_implementation != "sdpa":
        return False
    parts = dict(layer.named_children())
    inner = [parts[name] for name in ("attn", "crossattention", "mlp") if name in parts]
    products = [part for one in inner for name, part in one.named_children() if name.startswith(("c_", "q_"))]
    norms = [part for name, part in parts.items() if name.startswith("ln_")]
    kinds = {type(part) for part in (*inner, *products, *norms)}
    stock = kinds == {GPT2Attention, GPT2MLP, Conv1D, nn.LayerNorm}
    return stock and not is_watched((layer, *inner, *products, *norms, layer.mlp.act))


def run_plain(layer: Any, hidden: Tensor, context: TokenContext) -> Tensor:
    """As the layer does it, to the bit, with less around the products, which on a CPU costs a quarter of a small layer.

    Where some rows rest, attention reads each row's entries where they lie: copying them out costs more.

    Args:
        layer: of which `is_plain` is true.
        hidden: states of new tokens `[B, N, H]`.
        context: of these tokens; its cache tells the entries of all rows of the batch (`append`, `of_images`).
    """
    attention, mlp, tokens, states = layer.attn, layer.mlp, hidden.shape[:2], hidden.flatten(0, 1)
    shape = (*tokens, 3, attention.num_heads, attention.head_dim)
    query, *new = _product(attention.c_attn, _normed(layer.ln_1, states)).view(shape).transpose(1, 3).unbind(2)
    entries = context.cache.append(attention.layer_idx, *new)
    mixed = _attend(query, entries, context.rows, context.mask, attention.scaling)
    states = states + _product(attention.c_proj, mixed)
    if context.encoder is not None:
        cross = layer.crossattention
        query = _product(cross.q_attn, _normed(layer.ln_cross_attn, states))
        query = query.view(*tokens, cross.num_heads, cross.head_dim).transpose(1, 2)
        entries = context.cache.of_images(attention.layer_idx)
        states = states + _product(cross.c_proj, _attend(query, entries, context.rows, None, cross.scaling))
    states = states + _product(mlp.c_proj, mlp.act(_product(mlp.c_fc, _normed(layer.ln_2, states))))
    return states.view(hidden.shape)


def _normed(norm: Any, states: Tensor) -> Tensor:
    return functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _product(layer: Any, states: Tensor) -> Tensor:
    return torch.addmm(layer.bias, states, layer.weight)


def _attend(query: Tensor, entries: Any, rows: tuple[int, ...] | None, mask: Tensor | None, scale: float) -> Tensor:
    """Attention of tokens `[R, heads, N, d]` to their own rows' entries among those of a batch, `[R N, H]`.

    The rows are places in the batch, or `None` for all of it; the mask is theirs, `[R or 1, 1, N, T]`, or `None`.
    """
    attend = partial(functional.scaled_dot_product_attention, scale=scale)
    if rows is None:
        mixed = attend(query, entries.keys, entries.values, attn_mask=mask)
    else:
        masks = [mask] * len(rows) if mask is None or len(mask) == 1 else mask.split(1)
        queries = zip(query.split(1), rows, masks, strict=True)
        mixed = torch.cat([
            attend(one, entries.keys[row : row + 1], entries.values[row : row + 1], attn_mask=own)
            for one, row, own in queries
        ])  # fmt: skip
    return mixed.transpose(1, 2).flatten(2).flatten(0, 1)
