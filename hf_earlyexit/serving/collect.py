"""One full pass over labelled rows, every exit's signals kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any, cast

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import DataError, UsageError
from ..labels import LABEL_COLUMNS, Labels, find_label_column, read_labels
from ..modeling.certificate import computing_dtype
from ..modeling.fingerprint import model_fingerprint
from ..modeling.finite import check_finite
from ..modeling.protocol import ExitModel, TorchExitClassifier, Wrapped
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, predictions
from ..trace import ExitTrace
from ..values import check_flags, check_whole, unexpected
from .batching import padding_token, sorted_batches
from .reader import PICTURES, RowReader, first_error, reader_for, reads_images
from .served import served_classifier
from .tables import plain_rows
from .walker import BatchWalker, ModelWalker


def collect_trace(
    model: Wrapped,
    rows: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    labels: Sequence[Any] | None = None,
    labelled: bool = True,
    split: str = "held-back",
    max_batch_tokens: int = 4096,
    max_length: int | None = None,
    progress: bool = True,
) -> ExitTrace:
    """Run every exit on every row and keep its logits, and every signal that the model can give beside them.

    Args:
        model: a model with exits; also within torch.compile, DataParallel or PEFT.
        rows: a data set with texts or token ids and a label column, or a sequence of texts or text pairs; for image
            classifiers with pictures in any form that `predict` takes, opened a few at a time.
        tokenizer: needed for texts.
        image_processor: needed for pictures.
        labels: one a row, where `rows` has no label column; in any form that `labels.read_labels` takes.
        labelled: False for rows without labels, such as traffic: the full model's answers stand in for them, and thresholds
            are then chosen for agreement with it. Labels that the rows have are not read.
        split: where the rows come from; "train" for rows the exits were trained on, which `calibrate` refuses.
        max_batch_tokens: padded tokens, or patches, in a batch.
        max_length: cut longer texts; the tokenizer's own limit by default.
        progress: show a bar.

    Returns:
        A trace in the order of the rows.

    Raises:
        DataError: for no rows, no labels, or a row whose label cannot be, naming it.
    """
    check_flags(labelled=labelled, progress=progress)
    check_whole(1, max_batch_tokens=max_batch_tokens)
    served = served_classifier(model)
    reader = reader_for(served, tokenizer, max_length, image_processor)
    if labelled:
        encoded, truth = labelled_rows(served, rows, reader, labels)
    else:
        encoded, truth = _unlabelled_rows(rows, reader, labels), None
    logits: Tensor | None = None  # filled in place, so that a large trace is in memory once
    scalars: dict[str, Tensor] = {}
    for indices, output in full_pass(served, encoded, max_batch_tokens, progress, served.signals):
        if logits is None:
            logits = torch.empty(len(encoded), *output.exit_logits.shape[1:])
            scalars = {name: torch.empty(len(encoded), *output.exit_scalars[name].shape[1:]) for name in served.signals}
        logits[indices] = output.exit_logits.float().cpu()
        for name, values in scalars.items():
            values[indices] = output.exit_scalars[name].float().cpu()
    assert logits is not None  # there is at least one row
    return make_trace(served, logits, truth, split, scalars)


def _unlabelled_rows(rows: Any, reader: RowReader, labels: Any) -> Sequence[Any]:
    if labels is not None:
        raise UsageError("labels=... contradicts labelled=False; leave one of them out.", field="labelled", value=False)
    encoded = reader.encode_all(rows)
    if not encoded:
        raise DataError("There are no rows; expected at least one.", field="rows")
    return encoded


def labelled_rows(
    model: ExitModel, rows: Any, reader: RowReader, labels: Sequence[Any] | None
) -> tuple[Sequence[Any], Labels]:
    """What the model reads of every row, and its label.

    Raises:
        DataError: for no rows, another number of labels, or a label that cannot be.
        UsageError: for no labels at all.
    """
    encoded = reader.encode_all(rows)
    labels, column = _labels_of(rows, labels, reader)
    if not encoded or len(labels) != len(encoded):
        raise DataError(
            f"{len(encoded)} rows and {len(labels)} labels; expected at least one row, and a label each.", field="rows"
        )
    return encoded, read_labels(labels, model.config, column=column, may_leave_out=False)


def make_trace(
    model: ExitModel, logits: Tensor, labels: Labels | None, split: str, scalars: dict[str, Tensor] | None = None
) -> ExitTrace:
    """The trace of what a model said of rows; without labels the full model's answers stand in for them."""
    problem_type = _problem_type_of(model) if labels is None else labels.problem_type
    full = predictions(logits[:, -1], problem_type)
    return ExitTrace(
        logits=logits,
        labels=(full.float() if problem_type == MULTI_LABEL else full) if labels is None else labels.values.cpu(),
        labelled=labels is not None,
        exit_layers=model.exit_layers,
        problem_type=problem_type,
        split=split,
        scalars=scalars or {},
        cost=None if model.config.exit_cost is None else tuple(map(float, model.config.exit_cost)),
        fingerprint=model_fingerprint(model),
        meta={
            "dtype": computing_dtype(model),
            "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        },
    )


def _problem_type_of(model: ExitModel) -> str:
    """What a model's outputs mean where no labels tell."""
    if model.config.problem_type is not None:
        return str(model.config.problem_type)
    return REGRESSION if model.config.num_labels == 1 else SINGLE_LABEL


def full_pass(
    model: Wrapped,
    encoded: Sequence[Any],
    max_batch_tokens: int,
    progress: bool,
    signals: Sequence[str] | None = None,
) -> Iterator[tuple[list[int], Any]]:
    """Run every exit on encoded rows, batch by batch; gives the rows' places and the model's output.

    Args:
        model, max_batch_tokens, progress: as in `collect_trace`.
        encoded: the rows as the model reads them.
        signals: names of what the exits give beside their logits, as `exit_signals` in the model's `forward`.

    Raises:
        DataError: for a row the model cannot read, or one whose logits are not finite.
    """
    served = served_classifier(model)
    walker: BatchWalker = getattr(served, "walker", None) or ModelWalker(cast(TorchExitClassifier, served))
    size, pad = PICTURES if reads_images(served) else max(len(encoded), 1), padding_token(served.config)
    with torch.inference_mode(), tqdm(total=len(encoded), disable=not progress, unit="row") as bar:
        for first in range(0, len(encoded), size):
            rows = encoded[first : first + size]
            first_error(rows, walker.check, first)
            for group in walker.apart(rows):
                together = [rows[place] for place in group]
                for places, batch in sorted_batches(together, max_batch_tokens, pad, walker.length):
                    output = served(**batch.to(served.device), early_exit=False, exit_signals=signals)
                    numbers = [first + group[place] for place in places]
                    check_finite(output.exit_logits, numbers)
                    yield numbers, output
                    bar.update(len(numbers))


def _labels_of(rows: Any, labels: Any, reader: RowReader) -> tuple[Any, str]:
    """The labels, one a row, and the column they stand in."""
    if labels is not None:
        if not isinstance(labels, Iterable) or getattr(labels, "shape", None) == ():
            raise unexpected("labels", labels, "one a row")
        return (labels if hasattr(labels, "__len__") else list(labels)), "labels"
    rows = plain_rows(rows, reader.columns)
    column = find_label_column(list(rows) if isinstance(rows, dict) else getattr(rows, "column_names", None) or ())
    if column is None:
        raise UsageError(
            f"No labels: pass labels=[...], or rows with a column called {' or '.join(LABEL_COLUMNS)}.", field="labels"
        )
    return list(rows[column]), column
