"""What is given as rows: data sets, tables of columns, or rows one by one; taken as what they are, or refused in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from os import PathLike
from typing import Any

from ..errors import DataError, UsageError

PIXELS = "pixel_values"
MODEL_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
UNREAD_COLUMNS = ("position_ids", "inputs_embeds")  # would change answers, so they are not passed over
TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
)
EXPECTED = (
    "a list of texts, pairs of texts, token ids or pictures, an iterator of these, a data set, a DataFrame, or columns by "
    'name such as a tokenizer returns for several texts or {"text": [...]}'
)


Columns = Callable[[Iterable[str]], tuple[str, ...]]


def text_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The column or pair of columns that holds the texts.

    Raises:
        DataError: if none of the usual names is there.
    """
    columns = list(columns)
    matches = [names for names in TEXT_COLUMNS if set(names) <= set(columns)]
    if not matches:
        usual = ", ".join("+".join(names) for names in TEXT_COLUMNS)
        raise DataError(f"No text column among {', '.join(map(str, columns))}; expected one of {usual}.", field="rows")
    return max(matches, key=len)


def plain_rows(rows: Any, columns: Columns | None = None) -> Any:
    """Rows without what their library puts around them.

    Args:
        rows: whatever a caller gives as rows.
        columns: chooses those that are read; token ids or texts by default.

    Returns:
        A data set of plain Python values, a dict of columns (lists of equal length), or an iterable of rows.

    Raises:
        UsageError: for what holds no rows.
        DataError: for columns of different lengths.
    """
    if isinstance(rows, (str, bytes, PathLike)):
        raise UsageError("rows is one text or file; expected a list: pass [text].", field="rows", value=rows)
    if hasattr(rows, "column_names") and hasattr(rows, "select_columns") and hasattr(rows, "iter"):
        return rows if _transforms(rows) else _undecoded(rows.with_format(None))
    if isinstance(rows, Mapping):
        if splits := [name for name, part in rows.items() if hasattr(part, "column_names")]:
            raise UsageError(
                f"rows is a {type(rows).__name__} of splits ({', '.join(map(str, splits))}); pass one, rows[{splits[0]!r}].",
                field="rows",
            )
        return _columns({name: rows[name] for name in rows}, columns)
    if hasattr(rows, "columns") and callable(getattr(rows, "to_dict", None)):  # a DataFrame of pandas or polars
        return _columns({name: [_value(value) for value in rows[name]] for name in rows.columns}, columns)
    if hasattr(rows, "column_names") and hasattr(rows, "to_pydict"):  # a table of pyarrow
        return _columns(rows.to_pydict(), columns)
    if isinstance(rows, (set, frozenset)):
        raise UsageError("rows is a set, which has no order; expected a list.", field="rows")
    if getattr(rows, "ndim", 1) > 1 or getattr(getattr(rows, "dtype", None), "kind", "O") in "iufcb":
        shape = list(getattr(rows, "shape", ()))
        raise UsageError(
            f"rows is a {type(rows).__name__} of shape {shape}; pass it with its name and attention mask: "
            '{"input_ids": ids, "attention_mask": mask}.',
            field="rows",
        )
    if isinstance(rows, Iterable):
        return rows
    if hasattr(rows, "__getitem__") and hasattr(rows, "__len__"):
        return (rows[place] for place in range(len(rows)))
    raise UsageError(f"rows is of type {type(rows).__name__}; expected {EXPECTED}.", field="rows", value=rows)


def windows(rows: Any, size: int, columns: Columns | None = None) -> Iterator[list[Any]]:
    """Up to `size` rows at a time: texts, pairs of texts, pictures, or token ids or pixel values by column name.

    Args:
        rows, columns: as for `plain_rows`.
        size: rows of a window, at least 1.

    Raises:
        UsageError: for what holds no rows.
        DataError: for columns that hold neither texts nor token ids, or have different lengths.
    """
    names, rows = columns or named_columns, plain_rows(rows, columns)
    if isinstance(rows, dict):
        table = {name: rows[name] for name in names(rows)}
        count = len(next(iter(table.values())))
        for start in range(0, count, size):
            yield _rows_of({name: values[start : start + size] for name, values in table.items()})
    elif not hasattr(rows, "column_names"):
        source = iter(rows)
        while window := list(islice(source, size)):
            yield window
    else:
        if rows.column_names and not _transforms(rows):
            rows = rows.select_columns(list(names(rows.column_names)))
        for batch in rows.iter(size):
            yield _rows_of({name: batch[name] for name in names(batch)})


def named_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns that are read, token ids before texts."""
    columns = list(columns)
    if "input_ids" in columns:
        return tuple(name for name in (*MODEL_COLUMNS, *UNREAD_COLUMNS) if name in columns)
    return text_columns(columns)


def _rows_of(columns: Mapping[str, Sequence[Any]]) -> list[Any]:
    values = zip(*columns.values(), strict=True)
    if "input_ids" in columns or PIXELS in columns:
        return [dict(zip(columns, row, strict=True)) for row in values]
    return [row[0] if len(row) == 1 else row for row in values]


def _columns(columns: dict[Any, Any], names: Columns | None) -> dict[Any, list[Any]]:
    """Columns as lists, the ones that are read of equal length; one row's values in place of columns are refused."""
    lists: dict[Any, list[Any]] = {}
    for name in (names or named_columns)(columns):
        values = columns[name]
        if values is None:
            continue
        if _is_one_row(name, values):
            raise UsageError(
                f"rows has one row's {name} in place of a column; expected a value for each of several rows: pass [row].",
                field=name,
                value=values,
            )
        pictures = name not in MODEL_COLUMNS and getattr(values, "ndim", 1) > 1
        lists[name] = values.tolist() if hasattr(values, "tolist") and not pictures else list(values)
    if len({len(values) for values in lists.values()}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in lists.items())
        raise DataError(f"The columns of rows are of different lengths ({lengths}); expected one value a row.", field="rows")
    return {**columns, **lists}


def _is_one_row(name: str, values: Any) -> bool:
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        return True
    if name == PIXELS and hasattr(values, "ndim"):
        return values.ndim == 3 and getattr(getattr(values, "dtype", None), "kind", "f") != "O"
    if name not in MODEL_COLUMNS:
        return False
    if hasattr(values, "ndim"):
        return values.ndim < 2 and getattr(getattr(values, "dtype", None), "kind", "i") != "O"
    first = next(iter(values), None)
    return first is not None and getattr(first, "ndim", 0) == 0 and not isinstance(first, (list, tuple))


def _transforms(rows: Any) -> bool:
    """Whether a data set makes its rows, columns of other names perhaps, when they are asked for."""
    return (getattr(rows, "format", None) or {}).get("type") == "custom"


def _value(value: Any) -> Any:
    """A cell of a DataFrame, `None` where it is missing: such cells are nan among objects."""
    return None if isinstance(value, float) and value != value else value


def _undecoded(rows: Any) -> Any:
    """A data set whose pictures stay files, so that one that is broken is an error of its own row."""
    for name, feature in (getattr(rows, "features", None) or {}).items():
        if type(feature).__name__ == "Image" and getattr(feature, "decode", False):
            rows = rows.cast_column(name, replace(feature, decode=False))
    return rows
