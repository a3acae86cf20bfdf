"""Labels of any form, read in one place: for losses, traces and evaluations alike."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL

LABEL_COLUMNS = ("labels", "label", "label_ids")
LEFT_OUT, UNLABELLED = -100, -1  # torch's mark for rows that no loss counts; the GLUE tasks' for rows whose label is secret
SHOWN = 8  # names that an error lists


class Labels(NamedTuple):
    """Labels as losses take them, and what they mean.

    `values` is int64 `[N]` for one label a row, float `[N, C]` for many labels, float `[N]` or `[N, C]` for values.
    """

    values: Tensor
    problem_type: str


def label_problem_type(config: Any, labels: Tensor, name: str = "The batch", column: str = "labels") -> str:
    """What these labels mean, by the stock model's conventions, without writing it into the config.

    Args:
        config: of the model; `num_labels` and `problem_type` are read.
        labels: of some rows.
        name: what the rows are called in errors; column: where the labels stand.

    Raises:
        DataError: for class labels where the model has one output and no `problem_type`.
    """
    if config.problem_type is not None:
        return str(config.problem_type)
    whole = not labels.is_floating_point()
    if config.num_labels == 1:
        if whole:
            raise DataError(
                f"{name} has whole-number labels but the model has one output: set num_labels to the number of classes, or "
                "problem_type='regression' if they are values.",
                field=column,
            )
        return REGRESSION
    return SINGLE_LABEL if whole else MULTI_LABEL


def read_labels(
    values: Any, config: Any, name: str = "rows", *, column: str = "labels", may_leave_out: bool = True
) -> Labels:
    """Check labels against a model and give them in the form that losses take.

    Class numbers may come as whole numbers of any type, booleans, `[N, 1]`, or as the model's own class names
    (`config.label2id`); whole floats count as class numbers only where `problem_type` says that rows have one label. Many
    labels may come as floats; where `problem_type` says so also as whole numbers, booleans, or lists of class names.

    Args:
        values: tensor, array, or a sequence with an entry a row.
        config: of the model; `num_labels`, `problem_type` and `label2id` are read.
        name: what the rows are called in errors.
        column: where the labels stand, for errors.
        may_leave_out: whether -100 may stand for a class, as for losses, which pass over such rows.

    Raises:
        DataError: naming the first row at fault, the column, what came and what was expected.
    """
    tensor = values.detach() if isinstance(values, Tensor) else _as_tensor(values, config, name, column)
    if tensor.is_complex():
        _refuse(name, column, f"are of type {_kind(tensor)}", "numbers")
    if tensor.is_floating_point() and len(bad := _rows(~torch.isfinite(tensor))):
        raise DataError(
            f"Row {bad[0]} of {name} has a label that is not finite (column {column!r}); drop the row, or label it.",
            field=column,
            value=float("nan"),
        )
    if tensor.ndim == 0:
        _refuse(name, column, "are one value", "one a row: [B]")
    problem_type = _problem_type(tensor, config, name, column)
    if problem_type == SINGLE_LABEL:
        return Labels(_classes(tensor, config, name, column, may_leave_out), problem_type)
    if problem_type == MULTI_LABEL:
        return Labels(_many(tensor, config.num_labels, name, column), problem_type)
    return Labels(_values(tensor, config.num_labels, name, column), problem_type)


def find_label_column(columns: Sequence[str], names: Sequence[str] = LABEL_COLUMNS) -> str | None:
    """The first of `names` among the columns, or `None`."""
    return next((name for name in names if name in columns), None)


def label_numbers(labels: Iterable[Any], label2id: Mapping[str, int], name: str, column: str) -> list[Any]:
    """Class numbers of class names; whatever is no text is left as it is.

    Raises:
        DataError: naming the first row whose text is none of the names.
    """
    numbers = []
    for row, label in enumerate(labels):
        if isinstance(label, str) and label not in label2id:
            shown = ", ".join(list(label2id)[:SHOWN]) + (", ..." if len(label2id) > SHOWN else "")
            raise DataError(
                f"Row {row} of {name} has label {reprlib.repr(label)} (column {column!r}); expected a class number, or one "
                f"of the model's class names {shown}. Give the model your names with id2label and label2id, or number the "
                "labels, as "
                f"rows.class_encode_column({column!r}) does.",
                field=column,
                value=label,
            )
        numbers.append(label2id[label] if isinstance(label, str) else label)
    return numbers


# --- one problem type each ----------------------------------------------------------------------------------------------


def _problem_type(tensor: Tensor, config: Any, name: str, column: str) -> str:
    """As `label_problem_type`, for labels of a shape that goes with it."""
    classes, wide = config.num_labels, tensor.ndim == 2 and tensor.shape[1] > 1
    if config.problem_type is not None or classes == 1:
        return label_problem_type(config, tensor, name, column)
    if tensor.is_floating_point() and not wide and len(tensor):
        _refuse(
            name,
            column,
            f"are of type {_kind(tensor)} and shape {list(tensor.shape)}",
            f"class numbers from 0 to {classes - 1} as whole numbers. Cast the column, or load the model with num_labels=1 "
            "if they are values",
        )
    if wide and not tensor.is_floating_point():
        _refuse(
            name,
            column,
            f"are of type {_kind(tensor)} and shape {list(tensor.shape)}",
            f"one class number a row. Set problem_type='{MULTI_LABEL}' if a row may have several labels, which takes "
            f"{classes} float values a row; take the place of the 1 if it has one",
        )
    return label_problem_type(config, tensor, name, column)


def _classes(tensor: Tensor, config: Any, name: str, column: str, may_leave_out: bool) -> Tensor:
    classes = config.num_labels
    if tensor.ndim == 2 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    if tensor.ndim != 1:
        _refuse(name, column, f"have shape {list(tensor.shape)}", f"one class number from 0 to {classes - 1} a row")
    if _is_symbolic():
        return tensor.long()
    if tensor.is_floating_point() and len(bad := _rows(tensor != tensor.round())):
        _refuse_row(name, column, bad[0], tensor[bad[0]].item(), f"a class number from 0 to {classes - 1}")
    whole = tensor.long()
    counted = whole != LEFT_OUT if may_leave_out else torch.ones_like(whole, dtype=torch.bool)
    if len(bad := _rows(counted & ((whole < 0) | (whole >= classes)))):
        value = int(whole[bad[0]])
        leave_out = f", or {LEFT_OUT} to leave it out" if may_leave_out else ""
        cure = ""
        if value == UNLABELLED:
            cure = " -1 often marks rows without a label, such as GLUE's test rows: drop them"
        elif value == LEFT_OUT:
            cure = " Rows to be left out have no place here: drop them"
        _refuse_row(name, column, bad[0], value, f"0 to {classes - 1}{leave_out}", cure)
    return whole


def _many(tensor: Tensor, classes: int, name: str, column: str) -> Tensor:
    if tensor.ndim == 1 and classes == 1:
        tensor = tensor[:, None]
    if tensor.ndim != 2 or tensor.shape[1] != classes:
        _refuse(
            name,
            column,
            f"have shape {list(tensor.shape)} and type {_kind(tensor)}",
            f"one value a label: problem_type {MULTI_LABEL} takes {classes} float values a row",
        )
    if not _is_symbolic() and len(places := ((tensor < 0) | (tensor > 1)).nonzero()):
        row, label = places[0].tolist()
        _refuse_row(
            name, column, row, tensor[row, label].item(), "values from 0 (no) to 1 (yes)", f" This is that of label {label}"
        )
    return tensor if tensor.is_floating_point() else tensor.float()


def _values(tensor: Tensor, outputs: int, name: str, column: str) -> Tensor:
    if tensor.ndim == 2 and tensor.shape[1] == 1 and outputs == 1:
        tensor = tensor[:, 0]
    if tensor.shape[1:] != (() if outputs == 1 else (outputs,)):
        wanted = "one value a row" if outputs == 1 else f"{outputs} values a row"
        _refuse(name, column, f"have shape {list(tensor.shape)}", f"{wanted}: problem_type is {REGRESSION}")
    return tensor if tensor.is_floating_point() else tensor.float()


# --- reading ------------------------------------------------------------------------------------------------------------


def _as_tensor(values: Any, config: Any, name: str, column: str) -> Tensor:
    entries = values if isinstance(values, np.ndarray) else list(values)
    array = as_array(entries)
    if array is None:  # texts, gaps, or rows of different lengths
        plain = [entry.tolist() if isinstance(entry, (Tensor, np.ndarray, np.generic)) else entry for entry in entries]
        for row, entry in enumerate(plain):
            if entry is None or type(entry).__name__ in ("NAType", "NaTType") or entry != entry:
                raise DataError(
                    f"Row {row} of {name} has no label (column {column!r} holds {entry!r}); drop the row, or label it.",
                    field=column,
                    value=entry,
                )
        if config.problem_type == MULTI_LABEL and _are_name_lists(plain):
            plain = [_indicator(entry, config, name, column, row) for row, entry in enumerate(plain)]
        array = as_array(label_numbers(plain, config.label2id or {}, name, column))
        if array is None:
            _explain(plain, config.num_labels, name, column)
    if array.dtype == np.uint64:
        array = np.minimum(array, np.iinfo(np.int64).max)
    if not array.flags.writeable or array.dtype.kind == "u" or not array.dtype.isnative:
        array = array.astype(np.int64 if array.dtype.kind == "u" else array.dtype.newbyteorder("="))
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def as_array(entries: Any) -> np.ndarray | None:
    """Numbers as an array; `None` if they are none, or no table."""
    try:
        array = np.asarray(entries)
    except (ValueError, TypeError, OverflowError):
        return None
    return array if array.dtype.kind in "biuf" and array.ndim else None


def _are_name_lists(entries: list[Any]) -> bool:
    return all(isinstance(entry, (list, tuple)) and all(isinstance(part, str) for part in entry) for entry in entries)


def _indicator(names: Sequence[str], config: Any, name: str, column: str, row: int) -> list[float]:
    """1 at the labels that a row has, 0 at the others."""
    try:
        numbers = label_numbers(names, config.label2id or {}, name, column)
    except DataError as error:
        raise DataError(
            f"Row {row} of {name} has {error.value!r}, which is none of the model's class names (column {column!r}).",
            field=column,
            value=error.value,
        ) from error
    return [float(number in numbers) for number in range(config.num_labels)]


def _explain(entries: list[Any], classes: int, name: str, column: str) -> NoReturn:
    """Refuse what is no table of numbers, by the first row that is unlike a label."""
    lists = [isinstance(entry, (list, tuple)) for entry in entries]
    if all(lists) and len({len(entry) for entry in entries}) > 1:
        length = len(entries[0])
        row = next(row for row, entry in enumerate(entries) if len(entry) != length)
        _refuse_row(
            name,
            column,
            row,
            entries[row],
            f"as many numbers as row 0 ({length})",
            f" Make lists of class numbers into {classes} values a row, 1.0 where the class is in the list and 0.0 "
            f"elsewhere, and set problem_type='{MULTI_LABEL}'",
        )
    row = next((row for row, is_list in enumerate(lists) if is_list != lists[0]), 0)
    row = next((row for row, entry in enumerate(entries) if not isinstance(entry, (int, float, list, tuple))), row)
    if isinstance(entries[row], int):  # then some number has more digits than an array holds
        row = next(row for row, entry in enumerate(entries) if isinstance(entry, int) and abs(entry) >= 2**63)
        _refuse_row(name, column, row, entries[row], f"0 to {classes - 1}")
    _refuse_row(name, column, row, entries[row], "a number, or a list of numbers of the same length in every row")


def _rows(bad: Tensor) -> list[int]:
    """Numbers of the rows with a fault."""
    if _is_symbolic() or not bool(bad.any()):
        return []
    return bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()


def _is_symbolic() -> bool:
    """Whether values cannot be looked at, since a graph is being made."""
    return torch.compiler.is_compiling()


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _refuse(name: str, column: str, fault: str, expected: str) -> NoReturn:
    raise DataError(f"The labels of {name} (column {column!r}) {fault}; expected {expected}.", field=column)


def _refuse_row(name: str, column: str, row: int, value: Any, expected: str, cure: str = "") -> NoReturn:
    ending = f".{cure}." if cure else "."
    raise DataError(
        f"Row {row} of {name} has label {reprlib.repr(value)}; expected {expected} (column {column!r}){ending}",
        field=column,
        value=value,
    )
