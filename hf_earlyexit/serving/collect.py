"""One full pass over labelled rows, every exit's signals kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError, UsageError
from ..modeling.classifier import label_problem_type
from ..modeling.fingerprint import model_fingerprint
from ..trace import ExitTrace
from .batching import evaluation_mode, sorted_batches
from .rows import encode_rows

LABEL_NAMES = ("labels", "label")


def collect_trace(
    model: Any,
    rows: Any,
    *,
    tokenizer: Any = None,
    labels: Sequence[Any] | None = None,
    split: str = "held-back",
    max_batch_tokens: int = 4096,
    max_length: int | None = None,
    progress: bool = True,
) -> ExitTrace:
    """Run every exit on every row and keep its logits, and its gate's where the model has gates.

    Args:
        model: a model with exits.
        rows: a data set with texts or token ids and a label column, or a sequence of texts or text pairs.
        tokenizer: needed for texts.
        labels: one a row, where `rows` has no label column.
        split: where the rows come from; "train" for rows the exits were trained on, which `calibrate` refuses.
        max_batch_tokens: padded tokens in a batch.
        max_length: cut longer texts; the tokenizer's own limit by default.
        progress: show a bar.

    Returns:
        A trace in the order of the rows.

    Raises:
        DataError: for no rows, no labels, or labels out of range.
    """
    encoded, truth = labelled_rows(rows, tokenizer, labels, max_length)
    chunks, gate_chunks, order = [], [], []
    for indices, output in full_pass(model, encoded, tokenizer, max_batch_tokens, progress):
        chunks.append(output.exit_logits.float().cpu())
        gate_chunks += [] if output.exit_gates is None else [output.exit_gates.float().cpu()]
        order += indices
    back = torch.tensor(order).argsort()
    gates = torch.cat(gate_chunks)[back] if gate_chunks else None
    return make_trace(model, torch.cat(chunks)[back], truth, split, gates)


def labelled_rows(
    rows: Any, tokenizer: Any, labels: Sequence[Any] | None, max_length: int | None
) -> tuple[list[dict[str, list[int]]], Tensor]:
    """Token ids and labels of every row.

    Raises:
        DataError: for no rows, or another number of labels.
        UsageError: for no labels at all.
    """
    encoded = encode_rows(rows, tokenizer, max_length)
    labels = _labels_of(rows, labels)
    if not encoded or len(labels) != len(encoded):
        raise DataError(
            f"{len(encoded)} rows and {len(labels)} labels; expected at least one row, and a label each.", field="rows"
        )
    return encoded, torch.as_tensor(labels)


def make_trace(model: Any, logits: Tensor, labels: Tensor, split: str, gates: Tensor | None = None) -> ExitTrace:
    """The trace of what a model said of labelled rows."""
    return ExitTrace(
        logits=logits,
        labels=labels,
        exit_layers=model.exit_layers,
        problem_type=label_problem_type(model.config, labels),
        split=split,
        gates=gates,
        cost=None if model.config.exit_cost is None else tuple(map(float, model.config.exit_cost)),
        fingerprint=model_fingerprint(model),
        meta={
            "dtype": str(model.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        },
    )


def full_pass(
    model: Any, encoded: Sequence[dict[str, list[int]]], tokenizer: Any, max_batch_tokens: int, progress: bool
) -> Iterator[tuple[list[int], Any]]:
    """Run every exit on encoded rows, batch by batch; gives the rows' places and the model's output."""
    batches = sorted_batches(encoded, max_batch_tokens, tokenizer)
    with torch.inference_mode(), evaluation_mode(model), tqdm(total=len(encoded), disable=not progress, unit="row") as bar:
        for indices, batch in batches:
            yield indices, model(**batch.to(model.device), early_exit=False)
            bar.update(len(indices))


def _labels_of(rows: Any, labels: Iterable[Any] | None) -> list[Any]:
    if labels is not None:
        return list(labels)
    columns = getattr(rows, "column_names", ())
    for name in LABEL_NAMES:
        if name in columns:
            return list(rows[name])
    raise UsageError(
        f"No labels: pass labels=[...], or rows with a column called {' or '.join(LABEL_NAMES)}.", field="labels"
    )
