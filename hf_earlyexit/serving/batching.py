"""Padded batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import BatchEncoding


def cut(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows of similar length that make a batch, the longest first.

    Args:
        lengths: tokens of every row.
        max_batch_tokens: most padded tokens in a batch; a longer row stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        places = order[start : start + max(max_batch_tokens // max(lengths[order[start]], 1), 1)]
        yield places
        start += len(places)


def sorted_batches(
    encoded: Sequence[dict[str, list[int]]], max_batch_tokens: int, tokenizer: Any = None
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Padded batches of rows of similar length, the longest first, with the rows' places.

    Args:
        encoded: token ids of every row.
        max_batch_tokens: most padded tokens in a batch; a longer row stands alone.
        tokenizer: gives the padding token; 0 without one.
    """
    for places in cut([len(row["input_ids"]) for row in encoded], max_batch_tokens):
        yield places, pad_batch([encoded[place] for place in places], getattr(tokenizer, "pad_token_id", None) or 0)


def pad_batch(rows: Sequence[dict[str, list[int]]], pad_token_id: int = 0) -> BatchEncoding:
    """One batch of tensors `[B, T]`, padded on the right, with an attention mask."""
    width = max(len(row["input_ids"]) for row in rows)
    filled: dict[str, list[list[int]]] = {"attention_mask": []}
    for row in rows:
        length = len(row["input_ids"])
        filled["attention_mask"].append(row.get("attention_mask", [1] * length) + [0] * (width - length))
        for name in ("input_ids", "token_type_ids"):
            if name in row:
                padding = pad_token_id if name == "input_ids" else 0
                filled.setdefault(name, []).append(list(row[name]) + [padding] * (width - length))
    return BatchEncoding({name: torch.tensor(values) for name, values in filled.items()})


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """`model.eval()` for a while, then back; a model that evaluates already is not touched, so threads may share it."""
    if not any(module.training for module in model.modules()):
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
