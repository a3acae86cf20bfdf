"""Faults in training data, named before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from ..errors import DataError
from ..labels import LABEL_COLUMNS, LEFT_OUT, UNLABELLED, Labels, as_array, find_label_column, label_numbers, read_labels
from ..problem_types import SINGLE_LABEL


class LabelKind(NamedTuple):
    """What the labels of a data set mean, `None` if that cannot be seen, and whether they may be class names."""

    problem_type: str | None
    may_be_names: bool


class LabelColumn(NamedTuple):
    """A data set's labels as they stand there."""

    name: str
    values: list[Any]

    @property
    def are_names(self) -> bool:
        """Whether classes are given by name."""
        return any(isinstance(value, str) for value in self.values)

    @property
    def is_unlabelled(self) -> bool:
        """Whether every row has -1, the mark of rows whose label is secret."""
        array = as_array(self.values)
        return array is not None and array.size == len(self.values) and bool((array == UNLABELLED).all())


def check_data_set(rows: Any, name: str, config: Any, label_names: Sequence[str] = (), needed: bool = True) -> LabelKind:
    """Refuse a data set that cannot be trained or evaluated on.

    Args:
        rows: a data set with a length, or an iterable one, which cannot be looked through.
        name: the argument it came as.
        config: of the model.
        label_names: columns that hold the labels where they are there; otherwise one of `LABEL_COLUMNS` does.
        needed: whether rows must have labels.

    Returns:
        What is known of the labels.

    Raises:
        DataError: for no rows, no labels, labels that cannot be (naming row and column), or labels that are all ignored.
    """
    if not hasattr(rows, "__len__"):
        return LabelKind(None, True)
    if len(rows) == 0:
        raise DataError(f"{name} has no rows.", field=name)
    columns = _columns(rows)
    names = _candidates(columns, label_names)
    if needed and find_label_column(columns, names) is None:
        kind = ", ".join(map(str, columns)) or f"rows of type {type(rows[0]).__name__}"
        raise DataError(
            f"{name} has no column of labels among {kind}; expected {' or '.join(names)}. Rename the column, name it with "
            "label_names, or pass a data_collator that makes the labels.",
            field=name,
        )
    labels = label_column(rows, name, label_names)
    if labels is None:
        return LabelKind(None, True)
    read = read_labels(labels.values, config, name, column=labels.name)
    if read.problem_type == SINGLE_LABEL and bool((read.values == LEFT_OUT).all()):
        raise DataError(f"Every label of {name} is -100, so nothing can be learned or measured.", field=labels.name)
    return LabelKind(read.problem_type, labels.are_names)


def check_token_ids(rows: Any, name: str, padded: bool) -> None:
    """Refuse texts that no tokenizer has read, and token ids that nothing brings to one length.

    Args:
        rows: as in `check_data_set`.
        name: the argument it came as.
        padded: whether the collator pads.

    Raises:
        DataError: naming the columns that are there, or the lengths.
    """
    if not hasattr(rows, "__len__") or _is_made_on_the_fly(rows):
        return
    columns = _columns(rows)
    if columns and not {"input_ids", "inputs_embeds"} & set(columns):
        raise DataError(
            f"{name} has {', '.join(map(str, columns))} and no input_ids; let the tokenizer read it first: "
            "rows.map(lambda batch: tokenizer(batch['text'], truncation=True), batched=True).",
            field=name,
        )
    if not padded and "input_ids" in columns:
        lengths = {len(ids) for ids in _column(rows, "input_ids", name)}
        if len(lengths) > 1:
            raise DataError(
                f"Rows of {name} have {min(lengths)} to {max(lengths)} token ids, and nothing pads them; pass "
                "processing_class=tokenizer, or a data_collator that pads.",
                field=name,
            )


def label_column(rows: Any, name: str, label_names: Sequence[str] = ()) -> LabelColumn | None:
    """The labels of a data set; `None` if it has none, no length, or a transform that makes every row anew.

    Raises:
        DataError: for two columns of labels that differ, or a row without the label that the first row has.
    """
    if not hasattr(rows, "__len__") or not len(rows) or _is_made_on_the_fly(rows):
        return None
    columns = _columns(rows)
    present = [column for column in _candidates(columns, label_names) if column in columns]
    if not present:
        return None
    values = [_column(rows, column, name) for column in present]
    for column, others in zip(present[1:], values[1:], strict=True):
        if any(not np.array_equal(first, other) for first, other in zip(values[0], others, strict=True)):
            raise DataError(
                f"{name} has two columns of labels that differ, {present[0]} and {column}; drop one of them.", field=column
            )
    return LabelColumn(present[0], values[0])


def _candidates(columns: Sequence[str], label_names: Sequence[str]) -> Sequence[str]:
    return label_names if find_label_column(columns, label_names) is not None else LABEL_COLUMNS


def _columns(rows: Any) -> list[str]:
    columns = getattr(rows, "column_names", None)
    if columns is None or _is_made_on_the_fly(rows):
        columns = rows[0].keys() if isinstance(rows[0], Mapping) else ()
    return list(columns)


def _is_made_on_the_fly(rows: Any) -> bool:
    kept = getattr(rows, "format", None)
    return isinstance(kept, dict) and kept.get("type") == "custom"


def _column(rows: Any, column: str, name: str) -> list[Any]:
    if getattr(rows, "column_names", None) is not None:
        return list(rows.with_format(None)[column][:])
    values = []
    for index in range(len(rows)):
        row = rows[index]
        if column not in row:
            raise DataError(f"Row {index} of {name} has no {column}; row 0 has.", field=column)
        values.append(row[column])
    return values


class NamesToNumbers:
    """A collator before which labels that are class names become class numbers.

    Args:
        collate: what makes a batch of rows.
        config: of the model; its `label2id` has the names.
        names: columns that may hold the labels.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], config: Any, names: Sequence[str]) -> None:
        self.collate, self.config, self.names = collate, config, tuple(names)

    def __call__(self, rows: list[Any]) -> Any:
        column = find_label_column(list(rows[0]), self.names) if rows and isinstance(rows[0], Mapping) else None
        if column is not None and any(isinstance(row.get(column), str) for row in rows):
            numbers = label_numbers([row[column] for row in rows], self.config.label2id or {}, "the batch", column)
            rows = [{**row, column: number} for row, number in zip(rows, numbers, strict=True)]
        return self.collate(rows)


class Unlabelled(Dataset[Any]):
    """Rows without the columns that hold labels."""

    def __init__(self, rows: Any, names: Sequence[str]) -> None:
        self.rows, self.names = rows, tuple(names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self.rows[index].items() if name not in self.names}


def without_labels(rows: Any, names: Sequence[str] = LABEL_COLUMNS) -> Any:
    """The same rows, their labels left out."""
    if hasattr(rows, "remove_columns"):
        return rows.remove_columns([name for name in names if name in rows.column_names])
    return Unlabelled(rows, names)


def pop_labels(inputs: Mapping[str, Any], label_names: Sequence[str], config: Any) -> tuple[dict[str, Any], Labels | None]:
    """A batch without its labels, and the labels; `None` for a batch that has none.

    Raises:
        DataError: for labels that cannot be.
    """
    names = (*label_names, "labels")
    rest = {name: value for name, value in inputs.items() if name not in names}
    column = next((name for name in names if inputs.get(name) is not None), None)
    return rest, None if column is None else read_labels(inputs[column], config, "the batch", column=column)


def no_labels(inputs: Mapping[str, Any], label_names: Sequence[str]) -> DataError:
    """The error for a batch that has none."""
    return DataError(
        f"The batch has no labels among {', '.join(inputs)}; expected {' or '.join(label_names)}. Name the column of labels "
        "with label_names, or let the data_collator make it.",
        field="labels",
    )
