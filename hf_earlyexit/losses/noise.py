"""Random numbers that belong to a row, not to its place in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..labels import LEFT_OUT

_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685  # splitmix64, as signed numbers


def row_keys(ids: Sequence[int | str]) -> Tensor:
    """A 64-bit number for each id, the same in every run, `[len(ids)]`."""
    digests = (hashlib.blake2b(f"{type(key).__name__}:{key}".encode(), digest_size=8).digest() for key in ids)
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests], dtype=torch.long)


def label_keys(labels: Tensor) -> Tensor:
    """A 64-bit number for each row of labels `[B, T]`, the same in every batch, whatever is padded behind it, `[B]`."""
    places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return (_mixed(labels + places * _STEP) * (labels != LEFT_OUT)).sum(1)


def row_noise(keys: Tensor, seed: int, visit: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform numbers for each row that depend on its key, the seed and the visit alone.

    No generator is kept: nothing to save in a checkpoint, and a row draws the same in every batch and order, on every
    device and process.

    Args:
        keys: int64 `[B]`, from `row_keys` or `label_keys`.
        seed: of the run.
        visit: how often the row was drawn for before, or the step; another number gives other noise.
        shape: of one row's noise.

    Returns:
        `[B, *shape]`, float32 in `[0, 1)`.
    """
    count = torch.Size(shape).numel()
    places = torch.arange(1, count + 1, device=keys.device)
    start = _mixed(_mixed(keys + _wrapped(seed * _STEP)) + _wrapped(visit * _FIRST))
    bits = _mixed(start[:, None] + places * _STEP)
    return ((bits >> 40) & 0xFFFFFF).to(torch.float32).mul(2.0**-24).reshape(len(keys), *shape)


def _mixed(values: Tensor) -> Tensor:
    """Every bit of the result depends on every bit of the input; products wrap around as they should."""
    values = (values ^ _unsigned_shift(values, 30)) * _FIRST
    values = (values ^ _unsigned_shift(values, 27)) * _SECOND
    return values ^ _unsigned_shift(values, 31)


def _wrapped(number: int) -> int:
    """The number as 64 signed bits."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


def _unsigned_shift(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)
