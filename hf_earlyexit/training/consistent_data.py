"""Rows of a run in which exits are learned by reward, looked through before its first phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..errors import DataError
from ..labels import LABEL_COLUMNS, read_labels
from .checks import label_column
from .hardness import ExampleId, HardnessTable


def checked_rows(rows: Any, name: str, config: Any, label_names: Sequence[str]) -> Any:
    """The same rows, with the labels in a column where every phase looks for them.

    Args:
        rows: a data set with columns.
        name: the argument it came as.
        config: of the model.
        label_names: the column that holds the labels where it is there; otherwise one of `LABEL_COLUMNS` does.

    Raises:
        DataError: for what is no data set with columns, has no rows, or a row without a label (-100 stands for none): every
            row's hardness is measured, so each needs a true label.
    """
    columns = getattr(rows, "column_names", None)
    if columns is None or isinstance(columns, dict) or not hasattr(rows, "__len__"):
        raise DataError(
            f"{name} is {type(rows).__name__}; expected one datasets.Dataset: rows are read several times, by number.",
            field=name,
        )
    if not len(rows):
        raise DataError(f"{name} has no rows.", field=name)
    rows = rows.with_format(None)
    labels = label_column(rows, name, label_names)
    if labels is None:
        expected = " or ".join(label_names or LABEL_COLUMNS)
        raise DataError(
            f"{name} has no column of labels among {', '.join(columns)}; expected {expected}. "
            "Rename the column, or name it with label_names.",
            field=name,
        )
    read_labels(labels.values, config, name, column=labels.name, may_leave_out=False)
    if labels.name in LABEL_COLUMNS:
        return rows
    others = [column for column in LABEL_COLUMNS if column in columns]
    return rows.remove_columns(others).rename_column(labels.name, LABEL_COLUMNS[0])


def row_ids(rows: Any, column: str) -> tuple[ExampleId, ...]:
    """Each row's own id.

    Raises:
        DataError: without that column, or for an id that comes twice.
    """
    if column not in rows.column_names:
        raise DataError(
            f"No column {column!r} among {', '.join(rows.column_names)}: hardness is kept under each row's own id. Name the "
            f"column with id_column, or add one before anything is shuffled: rows.add_column({column!r}, range(len(rows))).",
            field="id_column",
            value=column,
        )
    ids = tuple(rows[column][:])
    HardnessTable(ids=ids, layers=torch.zeros(len(ids)), num_layers=1)  # each once
    return ids
