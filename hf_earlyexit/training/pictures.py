"""Rows of pictures as a trainer takes them: each is opened when its batch comes, by the library's one way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, TrainingError
from ..serving.pictures import PICTURE_COLUMNS, encode_picture
from ..serving.tables import PIXELS, plain_rows


def opened_rows(rows: Any, name: str, image_processor: Any) -> Any:
    """The same rows with pixel values in place of pictures.

    Args:
        rows: a data set, iterable or not, or list of rows with a picture, or pixel values, each.
        name: the argument they came as.
        image_processor: needed for pictures.

    Raises:
        DataError: for rows without pictures.
        TrainingError: for pictures without an image processor, or a tokenizer in its place.
    """
    if isinstance(rows, dict):
        return {split: opened_rows(part, name, image_processor) for split, part in rows.items()}
    if isinstance(image_processor, PreTrainedTokenizerBase):
        raise TrainingError(
            f"processing_class is a {type(image_processor).__name__}, and the model reads pictures; pass its "
            "image processor.",
            field="processing_class",
        )
    rows = plain_rows(rows) if hasattr(rows, "column_names") else rows  # undecoded, so that broken files are named
    column = _column(_first(rows), name)
    if column != PIXELS and image_processor is None:
        raise TrainingError(
            f"{name} holds pictures in {column!r}; pass processing_class=AutoImageProcessor.from_pretrained(...).",
            field="processing_class",
        )
    if not hasattr(rows, "__len__"):
        return PictureStream(rows, image_processor)
    return Pictures(rows, image_processor)


def _first(rows: Any) -> Any:
    return rows[0] if hasattr(rows, "__len__") else next(iter(rows), {})


def _column(row: Any, name: str) -> str:
    """The column of a row that holds its picture."""
    columns = list(row) if isinstance(row, Mapping) else []
    for column in (PIXELS, *PICTURE_COLUMNS):
        if column in columns:
            return column
    named = ", ".join(map(str, columns)) or f"rows of type {type(row).__name__}"
    raise DataError(
        f"{name} has no column of pictures among {named}; expected {', '.join(PICTURE_COLUMNS)} or {PIXELS}. "
        "Rename the column.",
        field=name,
    )


def _opened(row: Mapping[str, Any], number: int, image_processor: Any) -> dict[str, Any]:
    column = _column(row, f"Row {number}")
    rest = {name: value for name, value in row.items() if name not in (column, *PICTURE_COLUMNS)}
    return {**rest, PIXELS: encode_picture({column: row[column]}, image_processor, f"Row {number}")}


class Pictures(torch.utils.data.Dataset[Any]):
    """Rows with pixel values; a picture that cannot be read is an error that names its row."""

    def __init__(self, rows: Any, image_processor: Any) -> None:
        self.rows, self.image_processor = rows, image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return _opened(self.rows[place], place, self.image_processor)


class PictureStream(torch.utils.data.IterableDataset[Any]):
    """As `Pictures`, of rows without a known number."""

    def __init__(self, rows: Any, image_processor: Any) -> None:
        self.rows, self.image_processor = rows, image_processor

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew, where the rows know how."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows):
            yield _opened(row, number, self.image_processor)
