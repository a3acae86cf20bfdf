"""Layers that rows pass over at random while a decoder learns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..losses.noise import label_keys, row_noise


def dropped_layers(chances: Tensor, labels: Tensor, seed: int, step: int) -> Tensor:
    """Which rows pass over which layers, `[L, B]`.

    Nothing but the row's labels, the seed and the step decides: there is no state to save, and a row passes over the same
    layers in every batch and order, on every device and process.

    Args:
        chances: of each layer `[L]`.
        labels: `[B, T]`.
        seed: of the run.
        step: of the run.
    """
    noise = row_noise(label_keys(labels), seed, step, (len(chances),))
    return (noise.double() < chances.to(noise.device)).T


@contextmanager
def dropping(layers: Sequence[nn.Module], dropped: Tensor) -> Iterator[None]:
    """While this lasts, layers hand on what they were given, for the rows that pass over them.

    It has to last until the gradients are there: with gradient checkpointing, layers run a second time for them.

    Args:
        layers: of the decoder.
        dropped: from `dropped_layers`.
    """
    before = [vars(layer).get("forward") for layer in layers]  # of its own, as others may have put there
    for layer, rows in zip(layers, dropped, strict=True):
        layer.forward = _passed_over(layer.forward, rows)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward
            if own is not None:
                layer.forward = own


def _passed_over(run: Callable[..., Tensor], rows: Tensor) -> Callable[..., Tensor]:
    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(hidden) != len(rows):
            raise TrainingError(
                f"A layer was given {len(hidden)} rows of a batch of {len(rows)}; layers are dropped row by row, so batches "
                "must stay whole. Train with layer_dropout 0, or with one process for each device.",
                field="layer_dropout",
            )
        return torch.where(rows.to(hidden.device)[:, None, None], hidden, run(hidden, *args, **kwargs))

    return forward
