"""Attention of rows end to end in one call: what it says of each row is what the row's own attention says."""

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_earlyexit.families import attention
from hf_earlyexit.families.attention import attend_at_once
from hf_earlyexit.families.packed import Packed

LENGTHS = (5, 1, 9, 0, 16, 2)
WAYS = [
    {},
    {"scale": 0.3},
    {"causal": True},
    {"window": 3},
    {"window": 3, "causal": True},
    {"window": 100, "scale": 2.0, "causal": True},
]


def parts(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, 2, 8, generator=generator, dtype=dtype) for _ in range(3)]


def ends_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def row_by_row(query, key, value, ends, scale=None, causal=False, window=None):
    """Every row by itself, its mask written out."""
    out = []
    for start, stop in pairwise(ends):
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (back < (window or 1000)) & (back > (-1 if causal else -(window or 1000)))
        q, k, v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
        out.append(scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1).flatten(1))
    return torch.cat(out)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("behind", [0, 7])  # tokens of nobody
def test_rows_of_any_length(way, behind):
    ends, given = ends_of(LENGTHS), parts(sum(LENGTHS) + behind)
    found = attend_at_once(*given, ends, 16, **way)
    assert torch.allclose(found[: ends[-1]], row_by_row(*given, ends, **way))
    assert found.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_as_runs_of_equal_length_say(way):
    lengths = tuple(filter(None, LENGTHS))
    context, given = Packed.of(lengths, None, torch.device("cpu")), parts(sum(lengths))
    assert torch.allclose(attend_at_once(*given, context.bounds, 16, **way), context.attend(*given, **way))


@pytest.mark.parametrize("way", WAYS)
def test_the_kernel_is_asked_for_the_same(monkeypatch, way):
    """A stand-in that takes what `varlen_attn` takes, as its documentation says."""

    def stand_in(query, key, value, ends, ends_of_keys, longest, longest_key, *, scale, window_size, num_splits):
        assert torch.equal(ends, ends_of_keys)
        assert (ends.dtype, longest, longest_key, num_splits) == (torch.int32, 16, 16, 1)
        left, right = (1000 if side == -1 else side for side in window_size)
        out = torch.empty_like(query)
        for start, stop in pairwise(ends):
            back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            q, k, v = (part[start:stop].transpose(0, 1) for part in (query, key, value))
            seen = (back <= left) & (back >= -right)
            out[start:stop] = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)
        return out

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    ends, given = ends_of(LENGTHS), parts(sum(LENGTHS))
    assert torch.allclose(attend_at_once(*given, ends, 16, **way), row_by_row(*given, ends, **way))


def test_the_kernel_is_for_half_precision_on_cuda():
    bare = torch.empty(4, 2, 8)
    assert not attention._has_kernel(bare)
    assert not attention._has_kernel(bare.bfloat16())
