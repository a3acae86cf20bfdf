"""Faults in training data, named before the first step."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import DataError
from ..problem_types import MULTI_LABEL, REGRESSION

LABEL_COLUMNS = ("labels", "label")


def check_data_set(rows: Any, name: str, num_labels: int, problem_type: str | None) -> None:
    """Refuse a data set that cannot be trained or evaluated on.

    Args:
        rows: a data set with a length, or an iterable one, which cannot be looked through.
        name: the argument it came as.
        num_labels: outputs of the model.
        problem_type: as in the config.

    Raises:
        DataError: for no rows, labels out of range (naming the row), labels that are all ignored, or the wrong kind.
    """
    if not hasattr(rows, "__len__"):
        return
    if len(rows) == 0:
        raise DataError(f"{name} has no rows.", field=name)
    labels = _labels(rows)
    if labels is None:
        return
    if problem_type is None and num_labels > 1 and (labels.ndim > 1 or np.issubdtype(labels.dtype, np.floating)):
        problem_type = MULTI_LABEL  # as the model will take them
    if np.issubdtype(labels.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(labels).reshape(len(labels), -1).all(1))
        if len(bad):
            raise DataError(f"Row {bad[0]} of {name} has a label that is not finite.", field="labels")
    if problem_type == MULTI_LABEL:
        if labels.ndim != 2 or labels.shape[1] != num_labels or not np.issubdtype(labels.dtype, np.floating):
            raise DataError(
                f"{name} has labels of shape {list(labels.shape)} and type {labels.dtype}; problem_type "
                f"multi_label_classification takes {num_labels} float values a row.",
                field="labels",
            )
        return
    if problem_type == REGRESSION or np.issubdtype(labels.dtype, np.floating):
        return
    if num_labels == 1:
        raise DataError(
            f"{name} has whole-number labels but the model has one output: set num_labels to the number of classes, or "
            "problem_type='regression' if they are values.",
            field="labels",
        )
    bad = np.flatnonzero((labels != -100) & ((labels < 0) | (labels >= num_labels)))
    if len(bad):
        raise DataError(
            f"Row {bad[0]} of {name} has label {labels[bad[0]]}; expected 0 to {num_labels - 1}, or -100 to leave it out.",
            field="labels",
            value=int(labels[bad[0]]),
        )
    if (labels == -100).all():
        raise DataError(f"Every label of {name} is -100, so nothing can be learned or measured.", field="labels")


def _labels(rows: Any) -> np.ndarray | None:
    columns = getattr(rows, "column_names", None)
    if columns is None:
        first = rows[0]
        column = next((name for name in LABEL_COLUMNS if isinstance(first, dict) and name in first), None)
        return None if column is None else np.asarray([np.asarray(rows[index][column]) for index in range(len(rows))])
    column = next((name for name in LABEL_COLUMNS if name in columns), None)
    return None if column is None else np.asarray(rows.with_format("numpy")[column][:])
