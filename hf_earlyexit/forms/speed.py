"""Which of several models is the fastest on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch

from ..families.checks import picture_of
from ..modeling.protocol import ExitClassifier
from ..serving.batching import padding_token
from ..serving.predict import predict
from ..serving.reader import reads_images
from ..serving.tables import PIXELS
from ..timing import seconds_in_turns

Model = TypeVar("Model", bound=ExitClassifier)
THROUGHPUT, LATENCY = HINTS = ("throughput", "latency")
ROWS, TOKENS, TURNS = 16, 32, 3  # a full batch of a CPU; turns after one to warm up


def fastest(models: Mapping[str, Model], hint: str, clock: Callable[[], float] | None = None) -> Model:
    """The model that answers made-up rows in the shortest time; depths are the same, as no row leaves early.

    Args:
        models: classifiers by name, at least one; of equals the first.
        hint: "throughput" for all rows at once, "latency" for one by one.
        clock: seconds; the wall clock by default.
    """
    if len(models) == 1:
        return next(iter(models.values()))
    runs = {}
    for name, model in models.items():
        rows = made_up_rows(model, ROWS)
        batches = [rows] if hint == THROUGHPUT else [[row] for row in rows[:4]]
        runs[name] = [partial(predict, model, batch, early_exit=False) for batch in batches]
    seconds = seconds_in_turns(runs, TURNS, together=True, clock=clock)
    return models[min(seconds, key=lambda name: float(seconds[name].sum(1).min()))]


def made_up_rows(model: ExitClassifier, count: int) -> list[dict[str, Any]]:
    """Rows of the usual size: token ids, or pixel values."""
    config = model.config
    if reads_images(model):
        return [{PIXELS: torch.zeros(picture_of(config))} for _ in range(count)]
    most = model.family.longest(config)
    ids = [token for token in range(config.vocab_size) if token != padding_token(config)][:ROWS] or [0]
    return [{"input_ids": [ids[row % len(ids)]] * min(TOKENS, most)} for row in range(count)]
