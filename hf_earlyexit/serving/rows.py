"""From rows of any kind and number to windows of token ids, with an error in the place of a row that has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

from ..errors import DataError, UsageError

MODEL_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
TEXT_COLUMNS = (
    ("text",),
    ("sentence",),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("text", "text_pair"),
)

TokenIds = dict[str, list[int]]


def text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """The column or pair of columns that holds the texts.

    Raises:
        DataError: if none of the usual names is there.
    """
    found = [names for names in TEXT_COLUMNS if set(names) <= set(columns)]
    if not found:
        usual = ", ".join("+".join(names) for names in TEXT_COLUMNS)
        raise DataError(f"No text column among {', '.join(columns)}; expected one of {usual}.", field="rows")
    return max(found, key=len)


def windows(rows: Any, size: int) -> Iterator[list[Any]]:
    """Up to `size` rows at a time: texts, pairs of texts, or token ids by column name.

    Args:
        rows: a data set (also a streamed one) with token ids or texts, or any iterable of texts, pairs or token ids.
        size: rows of a window, at least 1.

    Raises:
        UsageError: for one bare text.
    """
    if isinstance(rows, str):
        raise UsageError("rows is one text; expected a list of texts: pass [text].", field="rows", value=rows)
    columns = getattr(rows, "column_names", None)
    if not columns:
        source = iter(rows)
        while window := list(islice(source, size)):
            yield window
        return
    known = "input_ids" in columns
    names = [name for name in MODEL_COLUMNS if name in columns] if known else list(text_columns(columns))
    for batch in rows.select_columns(names).iter(size):
        values = zip(*(batch[name] for name in names), strict=True)
        if known:
            yield [dict(zip(names, row, strict=True)) for row in values]
        else:
            yield [row[0] if len(row) == 1 else row for row in values]


def encode_window(
    window: Sequence[Any], tokenizer: Any, max_length: int | None = None, first: int = 0
) -> list[TokenIds | DataError]:
    """Token ids of every row, without padding at the end; for a row that cannot be read, the error.

    Args:
        window: texts, pairs of texts, or token ids by column name.
        tokenizer: needed for texts.
        max_length: cut longer texts; the tokenizer's own limit by default.
        first: the number of the first row, for the errors.
    """
    encoded: list[Any] = [_kind(row, first + place) for place, row in enumerate(window)]
    for kind in (1, 2):
        places = [place for place, found in enumerate(encoded) if found == kind]
        if not places:
            continue
        if tokenizer is None:
            raise UsageError("Texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).", field="tokenizer")
        found = _tokenize([window[place] for place in places], kind, tokenizer, max_length, [first + p for p in places])
        for place, ids in zip(places, found, strict=True):
            encoded[place] = ids
    return [_unpadded(window[place]) if found == 0 else found for place, found in enumerate(encoded)]


def encode_rows(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[TokenIds]:
    """Token ids of every row.

    Args:
        rows: as for `windows`.
        tokenizer: needed for texts.
        max_length: cut longer texts; the tokenizer's own limit by default.

    Raises:
        DataError: for the first row that cannot be read.
    """
    encoded: list[TokenIds] = []
    for window in windows(rows, 4096):
        for row in encode_window(window, tokenizer, max_length, len(encoded)):
            if isinstance(row, DataError):
                raise row
            encoded.append(row)
    return encoded


def check_ids(row: TokenIds, number: int, vocabulary: int, longest: int) -> DataError | None:
    """What keeps a model from reading these ids, if anything.

    Args:
        row: token ids by column name.
        number: of the row, for the error.
        vocabulary: ids the model knows, 0 to `vocabulary - 1`.
        longest: most tokens the model takes.
    """
    ids = row["input_ids"]
    if not 1 <= len(ids) <= longest:
        cure = "Pass truncation=True to the tokenizer, or split the text." if ids else "Drop the row."
        return _bad(number, f"has {len(ids)} tokens; this model takes 1 to {longest}. {cure}", row)
    if any(len(values) != len(ids) for values in row.values()):
        return _bad(number, f"has columns of different lengths ({', '.join(row)}); expected one value a token.", row)
    if not all(isinstance(number, int) for number in ids) or not 0 <= min(ids) <= max(ids) < vocabulary:
        return _bad(number, f"has token ids this model does not know; expected whole numbers from 0 to {vocabulary - 1}, "
                    "as the model's own tokenizer makes them.", row)  # fmt: skip
    return None


def check_any_token(row: TokenIds, number: int) -> DataError | None:
    """What keeps a model from reading a row where attention to nothing has no defined answer, if anything."""
    if any(row.get("attention_mask", (1,))):
        return None
    return _bad(number, "has no real token: its attention_mask is 0 throughout. Drop the row.", row)


def _kind(row: Any, number: int) -> int | DataError:
    """0 for token ids, 1 for a text, 2 for a pair."""
    if isinstance(row, str):
        return 1
    if isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(part, str) for part in row):
        return 2
    if isinstance(row, dict) and isinstance(row.get("input_ids"), Iterable):
        return 0
    return _bad(number, f"is {row!r}; expected a text, a pair of texts, or token ids under 'input_ids'.", row)


def _bad(number: int, why: str, value: Any) -> DataError:
    return DataError(f"Row {number} {why}", field="rows", value=value)


def _tokenize(rows: list[Any], kind: int, tokenizer: Any, max_length: int | None, numbers: list[int]) -> list[Any]:
    limit = None if max_length is None and tokenizer.model_max_length > 1e9 else max_length or tokenizer.model_max_length
    columns = [rows] if kind == 1 else [list(part) for part in zip(*rows, strict=True)]
    try:
        encoded = tokenizer(*columns, truncation=limit is not None, max_length=limit)
    except Exception as error:  # tokenizers raise many kinds; the rows are tried one by one to find the one at fault
        if len(rows) == 1:
            return [_bad(numbers[0], f"cannot be tokenized ({error}); it is {rows[0]!r}.", rows[0])]
        return [
            _tokenize([row], kind, tokenizer, max_length, [number])[0] for row, number in zip(rows, numbers, strict=True)
        ]
    return [{name: encoded[name][row] for name in encoded if name in MODEL_COLUMNS} for row in range(len(rows))]


def _unpadded(row: dict[str, Any]) -> TokenIds:
    """Without the masked tokens at the end; a row without any real token stays as it is."""
    ids = {name: list(row[name]) for name in MODEL_COLUMNS if name in row}
    mask = ids.get("attention_mask", [1])
    padding = next((place for place, real in enumerate(reversed(mask)) if real), 0)
    return {name: values[: len(values) - padding] for name, values in ids.items()} if padding else ids
