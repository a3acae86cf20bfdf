"""What a column of labels means: class numbers, names, several labels a row, or values; and its rows as numbers."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError, UsageError
from ..problem_types import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from ..values import check_choice

WHOLE = re.compile(r"[+-]?(0|[1-9]\d*)")
MOST_CLASSES_ALONE = 20  # names that each stand in one row only; more of them are no classes but texts or ids
UNLABELLED = -1
SHOWN = 8


@dataclass(frozen=True)
class Labelling:
    """How labels become numbers.

    Attributes:
        problem_type: one of `PROBLEM_TYPES`.
        names: of the classes, in the order of their numbers; `None` for values, or where nobody named them.
        num_labels: outputs of a model for them.
        notes: what was taken as meant, in sentences.
    """

    problem_type: str
    num_labels: int
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def shown_names(self) -> list[str] | None:
        """A name for every class, `None` for values."""
        if self.problem_type == REGRESSION:
            return None
        return list(self.names or (f"LABEL_{number}" for number in range(self.num_labels)))

    @classmethod
    def of_model(cls, config: Any) -> Labelling:
        """That of a trained classifier."""
        problem, count = config.resolved_problem_type, config.num_labels
        names = tuple(str(config.id2label[number]) for number in range(count))
        generic = all(name == f"LABEL_{number}" for number, name in enumerate(names))
        return cls(problem, count, None if generic or problem == REGRESSION else names)


def learn_labelling(
    labels: Sequence[Any],
    column: str,
    *,
    class_names: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    texts: Sequence[Any] | None = None,
    problem_type: str | None = None,
) -> Labelling:
    """Find out what labels mean.

    Words and booleans are names of classes, in alphabetical order; whole numbers from 0 are classes; lists of 0 and 1 are
    several labels a row; other numbers are values. Whole numbers written as values (0.0, 1.0) are classes only where they
    count from 0 without a gap, which is noted, and otherwise refused.

    Args:
        labels: one a row.
        column: they stand in, for errors.
        class_names: of a column that carries the names of its classes.
        names: wanted for the classes, in the order of their numbers; or the words of the column, in the order wanted.
        texts: a name for each row's class, from another column.
        problem_type: what the labels are, where they could be several things.

    Raises:
        DataError: for rows without a label and labels that cannot be told; it says how to tell them.
    """
    if problem_type is not None:
        check_choice(PROBLEM_TYPES, problem_type=problem_type)
    values = _checked(labels, column)
    if problem_type == REGRESSION:
        _as_values(values, column)
        return Labelling(REGRESSION, 1)
    if isinstance(values[0], (list, tuple)) or problem_type == MULTI_LABEL:
        return _several(values, column, names)
    notes: tuple[str, ...] = ()
    if isinstance(values[0], float):
        if problem_type is None and any(value != int(value) for value in values):
            return Labelling(REGRESSION, 1)
        values, notes = _whole_values(values, column, problem_type, names)
    if isinstance(values[0], (str, bool)):
        return _named([str(value) for value in values], column, names, notes)
    if names is not None and not set(map(str, values)) - set(names):
        return Labelling(SINGLE_LABEL, len(names), _distinct(names), notes)
    count = _count(values, column, names if class_names is None else class_names)
    known = names or class_names or (None if texts is None else _names_of(values, texts, count))
    return Labelling(SINGLE_LABEL, count, None if known is None else _distinct(known), notes)


def class_numbers(
    labels: Sequence[Any], column: str, labelling: Labelling, class_names: Sequence[str] | None = None
) -> list[Any]:
    """Labels as a model takes them: class numbers, lists of 0.0 and 1.0, or values.

    Args:
        labels: one a row.
        column: they stand in, for errors.
        labelling: of the model.
        class_names: of a column that carries the names of its classes; the model's own decide where both have names.

    Raises:
        DataError: naming the first row whose label is none of the model's.
    """
    values = _checked(labels, column)
    if labelling.problem_type == REGRESSION:
        return _as_values(values, column)
    if labelling.problem_type == MULTI_LABEL:
        return [_switches(value, row, column, labelling.num_labels) for row, value in enumerate(values)]
    number_of = _numbering(labelling, class_names, column, values)
    numbers = []
    for row, value in enumerate(values):
        number = number_of(value)
        if number is None:
            names = labelling.shown_names or []
            expected = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
            why = f"expected one of {expected}, or its number from 0 to {labelling.num_labels - 1}. If the column has other"
            raise _wrong(row, column, value, f"{why} words for these, give them in the same order with --label_names")
        numbers.append(number)
    return numbers


def _numbering(
    labelling: Labelling, class_names: Sequence[str] | None, column: str, values: Sequence[Any]
) -> Callable[[Any], int | None]:
    names = labelling.shown_names or []
    by_name = {name: number for number, name in enumerate(names)}
    if class_names is not None and labelling.names is not None:
        if not set(class_names) <= set(names):
            raise DataError(
                f"The classes of the column {column!r} are {', '.join(class_names[:SHOWN])}, those of the model "
                f"{', '.join(names[:SHOWN])}. Give the column's own in the order of the model's with --label_names.",
                field=column,
            )
        return lambda value: by_name[class_names[value]] if 0 <= value < len(class_names) else None
    if all(str(value) in by_name for value in values):
        return lambda value: by_name[str(value)]
    if isinstance(values[0], (str, bool)):
        alike: dict[str, list[int]] = defaultdict(list)
        for name, number in by_name.items():
            alike[name.casefold()].append(number)
        only = {name: numbers[0] for name, numbers in alike.items() if len(numbers) == 1}
        return lambda value: only.get(str(value).casefold())
    return _by_number(labelling.num_labels)


def _by_number(count: int) -> Callable[[Any], int | None]:
    def number(value: Any) -> int | None:
        whole = isinstance(value, (int, float)) and value == int(value) and 0 <= value < count
        return int(value) if whole else None

    return number


def _checked(labels: Sequence[Any], column: str) -> list[Any]:
    """Labels of one kind, with a label in every row; texts that are all numbers as these."""
    values = list(labels)
    if not values:
        raise DataError(f"The column {column!r} has no rows; expected at least one.", field=column)
    for row, value in enumerate(values):
        if (
            value is None
            or (isinstance(value, str) and not value.strip())
            or (isinstance(value, float) and math.isnan(value))
        ):
            raise _wrong(row, column, value, "which is none. Drop the row, or label it")
        if isinstance(value, float) and math.isinf(value):
            raise _wrong(row, column, value, "expected a finite number")
    kinds = [_kind(value) for value in values]
    if {*kinds} == {"a whole number", "a number"}:
        return [float(value) for value in values]
    if len(set(kinds)) > 1:
        row = next(row for row, kind in enumerate(kinds) if kind != kinds[0])
        raise _wrong(row, column, values[row], f"{kinds[row]}, where row 0 has {values[0]!r}, {kinds[0]}; expected one kind")
    if kinds[0] == "a text":
        return as_numbers(values) or [value.strip() for value in values]
    return values


def as_numbers(texts: Sequence[Any]) -> list[int] | list[float] | None:
    """Texts that are all whole numbers, or all finite numbers, as these; otherwise `None`."""
    if not all(isinstance(text, str) for text in texts):
        return None
    if all(WHOLE.fullmatch(text.strip()) for text in texts):
        return [int(text) for text in texts]
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int):
        return "a whole number"
    if isinstance(value, float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, (list, tuple)) else type(value).__name__


def _as_values(values: list[Any], column: str) -> list[float]:
    for row, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _wrong(row, column, value, "expected a number, since labels are values here")
    return [float(value) for value in values]


def _whole_values(
    values: list[float], column: str, problem_type: str | None, names: Sequence[str] | None
) -> tuple[list[int], tuple[str, ...]]:
    row = next((row for row, value in enumerate(values) if value != int(value)), None)
    if row is not None:
        raise _wrong(row, column, values[row], "expected a class number, since rows have one label each here")
    whole = sorted({int(value) for value in values})
    shown = ", ".join(f"{number:.1f}" for number in whole[:SHOWN])
    if problem_type is None and names is None and (whole != list(range(len(whole))) or len(whole) < 2):
        raise DataError(
            f"The column {column!r} holds {shown}: whole numbers that are written as values. Say --problem_type "
            f"{SINGLE_LABEL} if they are classes, {REGRESSION} if they are values.",
            field=column,
        )
    note = f"{shown} under {column!r} are taken as classes; say --problem_type {REGRESSION} if they are values."
    return [int(value) for value in values], () if problem_type or names else (note,)


def _named(values: list[str], column: str, names: Sequence[str] | None, notes: tuple[str, ...]) -> Labelling:
    rows_of: dict[str, int] = {}
    for row, value in enumerate(values):
        rows_of.setdefault(value, row)
    if names is not None:
        given = _distinct(names)
        for value, row in rows_of.items():
            if value not in given:
                raise _wrong(row, column, value, f"which is none of --label_names {', '.join(given[:SHOWN])}")
        return Labelling(SINGLE_LABEL, len(given), given, notes)
    spelt: dict[str, str] = {}
    for value, row in rows_of.items():
        other = spelt.setdefault(value.casefold(), value)
        if other != value:
            raise _wrong(row, column, value, f"which differs from {other!r} by its case alone. Spell each class one way")
    if len(rows_of) > MOST_CLASSES_ALONE and len(rows_of) == len(values):
        raise DataError(
            f"The column {column!r} has another label in every one of its {len(values)} rows, such as {values[0]!r}; name "
            "the column of labels with --label_column.",
            field=column,
        )
    return Labelling(SINGLE_LABEL, len(rows_of), tuple(sorted(rows_of)), notes)


def _count(values: list[int], column: str, names: Sequence[str] | None) -> int:
    low, high = min(values), max(values)
    if low < 0:
        cure = (
            "which often marks rows without a label, such as GLUE's test rows. Drop them"
            if low == UNLABELLED
            else "expected 0 or more"
        )
        raise _wrong(values.index(low), column, low, cure)
    if names is not None and high >= len(names):
        raise _wrong(
            values.index(high), column, high, f"but there are {len(names)} names of classes, for 0 to {len(names) - 1}"
        )
    distinct = len(set(values))
    if names is None and low > 0:
        raise DataError(
            f"The labels of the column {column!r} run from {low} to {high}: no row has class 0. If classes count from {low}"
            f", name them as they stand there, --label_names {' '.join(map(str, sorted(set(values))[:3]))} ...; if they are "
            f"values, say --problem_type {REGRESSION}.",
            field=column,
        )
    if names is None and high + 1 > 2 * distinct + 10:
        raise DataError(
            f"The labels of the column {column!r} run up to {high}, but only {distinct} of them occur; name the column of "
            f"labels with --label_column, say --problem_type {REGRESSION} if they are values, or give --label_names.",
            field=column,
        )
    return len(names) if names is not None else high + 1


def _names_of(values: list[int], texts: Sequence[Any], count: int) -> list[str]:
    known: dict[int, str] = {}
    for row, (value, text) in enumerate(zip(values, texts, strict=True)):
        if text is None or text == "":
            continue
        if known.setdefault(value, str(text)) != str(text):
            raise DataError(
                f"Class {value} is called {known[value]!r} and, in row {row}, {text!r} (column 'label_text'); give "
                "--label_names.",
                field="label_text",
                value=text,
            )
    return [known.get(number, f"LABEL_{number}") for number in range(count)]


def _several(values: list[Any], column: str, names: Sequence[str] | None) -> Labelling:
    count = len(values[0]) if isinstance(values[0], (list, tuple)) else 0
    for row, value in enumerate(values):
        _switches(value, row, column, count)
    if names is not None and len(names) != count:
        raise UsageError(f"{len(names)} label_names for {count} labels a row; expected one for each.", field="label_names")
    return Labelling(MULTI_LABEL, count, None if names is None else _distinct(names))


def _switches(value: Any, row: int, column: str, count: int) -> list[float]:
    fits = isinstance(value, (list, tuple)) and len(value) == count > 0
    if not fits or any(isinstance(part, str) or part not in (0, 1) for part in value):
        raise _wrong(row, column, value, f"expected a list of {count or 'as many'} zeros and ones as there are labels")
    return [float(part) for part in value]


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(
            f"Two classes are called {twice!r}; give each a name of its own: --label_names.", field="label_names"
        )
    return tuple(map(str, names))


def _wrong(row: int, column: str, value: Any, why: str) -> DataError:
    return DataError(f"Row {row} has the label {value!r} (column {column!r}), {why}.", field=column, value=value)
