"""From pictures of any kind to pixel values, with an error in the place of a row that has none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, EarlyExitError, UsageError
from ..images import open_image
from .tables import PIXELS, plain_rows, windows

PICTURE_COLUMNS = ("image", "img", "picture", "file_name")
Pixels = dict[str, Tensor]


def picture_columns(columns: Iterable[str]) -> tuple[str, ...]:
    """The column that holds pixel values or pictures.

    Raises:
        DataError: if none of the usual names is there.
    """
    columns = list(columns)
    for name in (PIXELS, *PICTURE_COLUMNS):
        if name in columns:
            return (name,)
    raise DataError(
        f"No pictures among {', '.join(map(str, columns)) or 'no columns'}; expected a column called "
        f"{', '.join(PICTURE_COLUMNS)} or {PIXELS}.",
        field="rows",
    )


def encode_pictures(window: Sequence[Any], image_processor: Any, first: int = 0) -> list[Pixels | EarlyExitError]:
    """Pixel values `[channels, height, width]` of every row; for one that cannot be read, the error.

    Args:
        window: pictures in any form that `open_image` takes, or mappings with one, or with `pixel_values`.
        image_processor: needed for pictures; it sees one at a time.
        first: the number of the first row, for the errors.
    """
    encoded: list[Pixels | EarlyExitError] = []
    for number, row in enumerate(window, first):
        try:
            encoded.append({PIXELS: encode_picture(row, image_processor, f"Row {number}")})
        except EarlyExitError as error:
            encoded.append(error)
    return encoded


def encode_picture(row: Any, image_processor: Any, name: str = "The row") -> Tensor:
    """Pixel values `[channels, height, width]` of one row.

    Args:
        row: as one of `encode_pictures`.
        image_processor: needed for pictures.
        name: of the row, for errors.

    Raises:
        DataError: for what is no picture, or one that the image processor does not take.
        UsageError: for a picture without an image processor.
    """
    if isinstance(row, Mapping) and not {"bytes", "path"} & set(row):
        try:
            (column,) = picture_columns(row)
        except DataError as error:
            raise _bad(name, f"cannot be read: {error}", row) from error
        if column == PIXELS:
            return _given_pixels(row[PIXELS], name)
        row = row[column]
    if isinstance(row, Tensor):
        raise _bad(name, f'is a tensor of shape {list(row.shape)}; pass pixel values by name: {{"{PIXELS}": ...}}.', row)
    if image_processor is None:
        raise UsageError(
            f"{name} is a picture. Pictures need an image processor: pass "
            "image_processor=AutoImageProcessor.from_pretrained(...).",
            field="image_processor",
        )
    try:
        picture = open_image(row, "rows")
    except DataError as error:
        raise _bad(name, f"cannot be read: {error}", row) from error
    try:
        return torch.as_tensor(image_processor(images=[picture], return_tensors="pt")[PIXELS])[0]
    except Exception as error:  # processors raise many kinds
        size = " x ".join(map(str, picture.size))
        raise _bad(name, f"is a picture of {size} that the image processor does not take ({error}).", row) from error


def _given_pixels(values: Any, name: str) -> Tensor:
    try:
        pixels = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        raise _bad(name, f"has {PIXELS} that are no numbers of one image ({error}).", values) from error
    if pixels.dtype == torch.uint8:
        raise _bad(
            name, f"has {PIXELS} of bytes, which no image processor has prepared; pass the picture under 'image'.", values
        )
    if pixels.ndim != 3:
        raise _bad(
            name, f"has {PIXELS} of shape {list(pixels.shape)}; expected one image, [channels, height, width].", values
        )
    return pixels.float()


def _bad(name: str, why: str, value: Any) -> DataError:
    return DataError(f"{name} {why}", field="rows", value=value)


class PictureRows(Sequence[Pixels]):
    """Rows of pictures, each of which is opened when it is asked for: prepared, a picture takes more room than its file.

    Args:
        rows: as for `plain_rows`.
        image_processor: needed for pictures.
    """

    def __init__(self, rows: Any, image_processor: Any) -> None:
        plain = plain_rows(rows, picture_columns)
        by_place = hasattr(plain, "column_names") and hasattr(plain, "__len__")
        self.rows = plain if by_place else [row for window in windows(plain, 256, picture_columns) for row in window]
        if by_place and (plain.format or {}).get("type") != "custom":
            self.rows = plain.select_columns(list(picture_columns(plain.column_names)))
        self.image_processor = image_processor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        """Raises DataError or UsageError for a row that cannot be read, naming it."""
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        (row,) = encode_pictures([self.rows[place]], self.image_processor, place)
        if isinstance(row, EarlyExitError):
            raise row
        return row
