"""From texts to batches of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import BatchEncoding

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


def encode_rows(rows: Any, tokenizer: Any, max_length: int | None = None) -> list[dict[str, list[int]]]:
    """Token ids of every row.

    Args:
        rows: a data set with token ids or texts, or a sequence of texts or text pairs.
        tokenizer: needed for texts.
        max_length: cut longer texts; the tokenizer's own limit by default.
    """
    if isinstance(rows, str):
        raise UsageError("rows is one text; expected a list of texts: pass [text].", field="rows", value=rows)
    columns = getattr(rows, "column_names", None)
    if columns is not None and "input_ids" in columns:
        keep = [name for name in MODEL_COLUMNS if name in columns]
        return [{name: list(row[name]) for name in keep} for row in rows.select_columns(keep)]
    if tokenizer is None:
        raise UsageError("Texts need a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...).", field="tokenizer")
    texts = _texts(list(rows)) if columns is None else [list(rows[name]) for name in text_columns(columns)]
    if not texts[0]:
        return []
    limit = None if max_length is None and tokenizer.model_max_length > 1e9 else max_length or tokenizer.model_max_length
    encoded = tokenizer(*texts, truncation=limit is not None, max_length=limit)
    return [{name: encoded[name][row] for name in encoded if name in MODEL_COLUMNS} for row in range(len(texts[0]))]


def _texts(rows: list[Any]) -> list[list[str]]:
    """One list of texts, or two of pairs."""
    if all(isinstance(row, str) for row in rows):
        return [rows]
    for place, row in enumerate(rows):
        if not (isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(part, str) for part in row)):
            raise DataError(
                f"Row {place} is {row!r}; expected a text, or a pair of texts in every row.", field="rows", value=row
            )
    return [list(part) for part in zip(*rows, strict=True)]


def sorted_batches(
    encoded: Sequence[dict[str, list[int]]], max_batch_tokens: int, tokenizer: Any = None
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Padded batches of rows of similar length, the longest first, with the rows' places.

    Args:
        encoded: token ids of every row.
        max_batch_tokens: most padded tokens in a batch; a longer row stands alone.
        tokenizer: gives the padding token; 0 without one.
    """
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]["input_ids"]))
    start = 0
    while start < len(order):
        width = max(len(encoded[order[start]]["input_ids"]), 1)
        indices = order[start : start + max(max_batch_tokens // width, 1)]
        yield indices, pad_batch([encoded[row] for row in indices], getattr(tokenizer, "pad_token_id", None) or 0)
        start += len(indices)


def pad_batch(rows: Sequence[dict[str, list[int]]], pad_token_id: int = 0) -> BatchEncoding:
    """One batch of tensors `[B, T]`, padded on the right, with an attention mask."""
    width = max(len(row["input_ids"]) for row in rows)
    filled: dict[str, list[list[int]]] = {"attention_mask": []}
    for row in rows:
        length = len(row["input_ids"])
        filled["attention_mask"].append(row.get("attention_mask", [1] * length) + [0] * (width - length))
        for name in ("input_ids", "token_type_ids"):
            if name in row:
                padding = pad_token_id if name == "input_ids" else 0
                filled.setdefault(name, []).append(list(row[name]) + [padding] * (width - length))
    return BatchEncoding(filled, tensor_type="pt")


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """`model.eval()` for a while, then back."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
