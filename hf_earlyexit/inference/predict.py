"""Answers for many texts at once, in the order they came."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .batching import encode_rows, evaluation_mode, sorted_batches


class Predictions(NamedTuple):
    """Answers of N rows: logits `[N, C]`, the layer each row left after `[N]` (1 to L), and its score there `[N]`.

    Without a policy the scores are nan.
    """

    logits: Tensor
    exit_layer: Tensor
    exit_score: Tensor


def predict(
    model: Any,
    rows: Any,
    *,
    tokenizer: Any = None,
    max_batch_tokens: int = 2048,
    max_length: int | None = None,
    early_exit: bool | None = None,
    operating_point: str | None = None,
    progress: bool = False,
) -> Predictions:
    """Classify many rows; batches hold rows of similar length, and rows leave them as they are decided.

    Args:
        model: a model with exits.
        rows: texts, text pairs, or a data set with texts or token ids.
        tokenizer: needed for texts.
        max_batch_tokens: padded tokens in a batch.
        max_length: cut longer texts; the tokenizer's own limit by default.
        early_exit, operating_point: as in `forward`.
        progress: show a bar.

    Returns:
        Answers in the order of the rows; of length 0 for no rows.
    """
    encoded = encode_rows(rows, tokenizer, max_length)
    result = Predictions(
        torch.zeros(len(encoded), model.config.num_labels),
        torch.zeros(len(encoded), dtype=torch.long),
        torch.full((len(encoded),), torch.nan),
    )
    batches = sorted_batches(encoded, max_batch_tokens, tokenizer)
    with torch.inference_mode(), evaluation_mode(model), tqdm(total=len(encoded), disable=not progress, unit="row") as bar:
        for indices, batch in batches:
            output = model(**batch.to(model.device), early_exit=early_exit, operating_point=operating_point)
            result.logits[indices] = output.logits.float().cpu()
            result.exit_layer[indices] = output.exit_layer.cpu()
            if output.exit_score is not None:
                result.exit_score[indices] = output.exit_score.cpu()
            bar.update(len(indices))
    return result
