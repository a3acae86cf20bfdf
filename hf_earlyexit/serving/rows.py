"""From rows of any kind to token ids, with an error in the place of a row that has none."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import DataError, EarlyExitError, UsageError
from .tables import MODEL_COLUMNS, UNREAD_COLUMNS, text_columns, windows

TokenIds = dict[str, list[int]]

IDS, TEXT, PAIR = range(3)


class ReadRow(dict[str, list[int]]):
    """Token ids by column name that need no reading: a tokenizer's own, whole numbers without padding at the end."""


def encode_window(
    window: Sequence[Any], tokenizer: Any, max_length: int | None = None, first: int = 0
) -> list[TokenIds | EarlyExitError]:
    """Token ids of every row, without padding at the end; for a row that cannot be read, the error.

    Args:
        window: texts, pairs of texts, or texts or token ids by column name; each a `ReadRow` where nothing is to be read.
        tokenizer: needed for texts; without one each text is an error.
        max_length: cut longer texts; the tokenizer's own limit by default.
        first: the number of the first row, for the errors.
    """
    types = set(map(type, window))
    if types == {ReadRow}:
        return list(window)
    if types == {str} and tokenizer is not None:
        return _tokenize(list(window), TEXT, tokenizer, max_length, range(first, first + len(window)))
    window = [_of_columns(row) if isinstance(row, Mapping) else row for row in window]
    kinds = [_kind(row, first + place) for place, row in enumerate(window)]
    encoded: list[Any] = list(kinds)
    for kind in (TEXT, PAIR):
        places = [place for place, other in enumerate(kinds) if other == kind]
        numbers = [first + place for place in places]
        texts = [window[place] for place in places]
        rows = (
            _tokenize(texts, kind, tokenizer, max_length, numbers) if tokenizer is not None else map(_no_tokenizer, numbers)
        )
        for place, row in zip(places, rows, strict=True):
            encoded[place] = row
    return [_read_ids(window[place], first + place) if row == IDS else row for place, row in enumerate(encoded)]


def encode_rows(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[TokenIds]:
    """Token ids of every row.

    Args:
        rows: as for `windows`.
        tokenizer: needed for texts.
        max_length: cut longer texts; the tokenizer's own limit by default.

    Raises:
        DataError: for the first row that cannot be read.
        UsageError: for texts without a tokenizer, and for what holds no rows.
    """
    encoded: list[TokenIds] = []
    for window in windows(rows, 4096):
        for row in encode_window(window, tokenizer, max_length, len(encoded)):
            if isinstance(row, EarlyExitError):
                raise row
            encoded.append(row)
    return encoded


def check_ids(row: TokenIds, number: int, vocabulary: int, longest: int, segments: int | None = None) -> DataError | None:
    """What keeps a model from reading these ids, if anything.

    Args:
        row: token ids by column name.
        number: of the row, for the error.
        vocabulary: ids the model knows, 0 to `vocabulary - 1`.
        longest: most tokens the model takes.
        segments: token types the model knows, 0 to `segments - 1`; `None` where it reads none.
    """
    ids = row["input_ids"]
    if not 1 <= len(ids) <= longest:
        cure = "Pass truncation=True to the tokenizer, or split the text." if ids else "Drop the row."
        return _bad(number, f"has {len(ids)} tokens; this model takes 1 to {longest}. {cure}", row)
    for values in row.values():
        if len(values) != len(ids):
            return _bad(number, f"has columns of different lengths ({', '.join(row)}); expected one value a token.", row)
    plain = set(map(type, ids)) == {int} or all(isinstance(number, int) for number in ids)
    if not plain or not 0 <= min(ids) <= max(ids) < vocabulary:
        return _bad(number, f"has token ids this model does not know; expected whole numbers from 0 to {vocabulary - 1}, "
                    "as the model's own tokenizer makes them.", row)  # fmt: skip
    types = row.get("token_type_ids", (0,))
    if segments is not None and not 0 <= min(types) <= max(types) < segments:
        return _bad(number, f"has token_type_ids from {min(types)} to {max(types)}; this model knows 0 to {segments - 1}. "
                    "Leave the column out, or take the model's own tokenizer.", row)  # fmt: skip
    return None


def check_any_token(row: TokenIds, number: int) -> DataError | None:
    """What keeps a model from reading a row where attention to nothing has no defined answer, if anything."""
    if any(row.get("attention_mask", (1,))):
        return None
    return _bad(number, "has no real token: its attention_mask is 0 throughout. Drop the row.", row)


def _of_columns(row: Mapping[str, Any]) -> Any:
    """The text or pair of texts of a row whose columns have names; a row that holds neither as it is."""
    if "input_ids" in row:
        return row
    try:
        names = text_columns(row)
    except DataError:
        return row
    return row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)


def _kind(row: Any, number: int) -> int | DataError:
    if isinstance(row, str):
        return TEXT
    if isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return PAIR
    if isinstance(row, Mapping) and "input_ids" in row:
        return IDS
    return _bad(number, f"is {_shown(row)}; expected a text, a pair of texts, or token ids under 'input_ids'.", row)


def _bad(number: int, why: str, value: Any) -> DataError:
    return DataError(f"Row {number} {why}", field="rows", value=value)


def _tokenize(rows: list[Any], kind: int, tokenizer: Any, max_length: int | None, numbers: Sequence[int]) -> list[Any]:
    if not rows:
        return []
    limit = None if max_length is None and tokenizer.model_max_length > 1e9 else max_length or tokenizer.model_max_length
    columns = [rows] if kind == 1 else [list(part) for part in zip(*rows, strict=True)]
    try:
        encoded = tokenizer(*columns, truncation=limit is not None, max_length=limit)
    except Exception as error:  # tokenizers raise many kinds; the rows are tried one by one to find the one at fault
        if len(rows) == 1:
            half = any("\ud800" <= letter <= "\udfff" for column in columns for letter in column[0])
            why = "it holds half of a surrogate pair, which is no character" if half else error
            return [_bad(numbers[0], f"cannot be tokenized ({why}); it is {rows[0]!r}.", rows[0])]
        return [
            _tokenize([row], kind, tokenizer, max_length, [number])[0] for row, number in zip(rows, numbers, strict=True)
        ]
    read = {name: encoded[name] for name in encoded if name in MODEL_COLUMNS}
    return [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]


def _no_tokenizer(number: int) -> UsageError:
    return UsageError(
        f"Row {number} is a text. Texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).",
        field="tokenizer",
    )


def _read_ids(row: Mapping[str, Any], number: int) -> TokenIds | DataError:
    """One row's columns as whole numbers, without the masked tokens at the end; a row without any real token stays whole."""
    for name in UNREAD_COLUMNS:
        if row.get(name) is not None:
            why = f"has {name}, which rows are served without: leave it out, or call the model itself."
            return _bad(number, why, row)
    ids: TokenIds = {}
    for name in MODEL_COLUMNS:
        values = row.get(name)
        if values is None and name != "input_ids":
            continue
        try:
            ids[name] = _whole_numbers(values, is_mask=name == "attention_mask")
        except (TypeError, ValueError, OverflowError) as error:
            expected = "0 and 1" if name == "attention_mask" else "whole numbers"
            return _bad(number, f"has {name} that cannot be read: {error}. Expected {expected}, one a token.", row)
    mask = ids.get("attention_mask", [1])
    padding = next((place for place, real in enumerate(reversed(mask)) if real), 0)
    return {name: values[: len(values) - padding] for name, values in ids.items()} if padding else ids


def _whole_numbers(values: Any, is_mask: bool) -> list[int]:
    """A list, tuple, array or tensor of whole numbers as a list.

    Raises:
        TypeError, ValueError, OverflowError: telling the value at fault.
    """
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"it has the shape {list(values.shape)}, which is not that of one row")
    if not isinstance(values, (list, tuple, range)):
        if not hasattr(values, "tolist"):
            raise TypeError(f"it is {_shown(values)}")
        values = values.tolist()
    numbers = list(values)
    if not set(map(type, numbers)) <= {int}:
        numbers = [_whole_number(value, is_mask) for value in numbers]
    if is_mask and numbers and not 0 <= min(numbers) <= max(numbers) <= 1:
        raise ValueError(f"it holds {_shown(min(numbers) if min(numbers) < 0 else max(numbers))}")
    return numbers


def _whole_number(value: Any, is_mask: bool) -> int:
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if is_mask and isinstance(plain, (bool, float)) and plain in (0, 1):
        return int(plain)
    if isinstance(plain, bool) or not hasattr(type(plain), "__index__"):
        raise TypeError(f"it holds {_shown(plain)}")
    return operator.index(plain)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
