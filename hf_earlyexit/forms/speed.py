"""Which of several models is the fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..families.vision import picture_of
from ..serving.predict import predict
from ..serving.reader import reads_images
from ..serving.tables import PIXELS

THROUGHPUT, LATENCY = HINTS = ("throughput", "latency")
ROWS, TOKENS, TURNS = 16, 32, 3  # a full batch of a CPU; turns after one to warm up


def fastest(models: Mapping[str, Any], hint: str, clock: Callable[[], float] = time.perf_counter) -> Any:
    """The model that answers made-up rows in the shortest time; depths are the same, as no row leaves early.

    Args:
        models: classifiers by name, at least one; of equals the first.
        hint: "throughput" for all rows at once, "latency" for one by one.
        clock: seconds.
    """
    if len(models) == 1:
        return next(iter(models.values()))
    given = {name: _rows(model) for name, model in models.items()}
    best = dict.fromkeys(models, float("inf"))
    for turn in range(1 + TURNS):
        for name, model in models.items():
            batches = [given[name]] if hint == THROUGHPUT else [[row] for row in given[name][:4]]
            start = clock()
            for batch in batches:
                predict(model, batch, early_exit=False)
            if turn:
                best[name] = min(best[name], clock() - start)
    return models[min(best, key=lambda name: best[name])]


def _rows(model: Any) -> list[dict[str, Any]]:
    """Rows of the usual size: token ids, or pixel values."""
    config = model.config
    if reads_images(model):
        return [{PIXELS: torch.zeros(picture_of(config))} for _ in range(ROWS)]
    most = model.family.longest(config)
    pad = getattr(config, "pad_token_id", None) or 0
    ids = [token for token in range(config.vocab_size) if token != pad][:ROWS] or [0]
    return [{"input_ids": [ids[row % len(ids)]] * min(TOKENS, most)} for row in range(ROWS)]
