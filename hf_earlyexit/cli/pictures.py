"""Pictures in the rows of files: which column holds them, and where files that are named there lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from ..data.formats import STDIN
from ..errors import DataError, UsageError
from ..serving.pictures import PICTURE_COLUMNS, picture_columns
from ..serving.tables import PIXELS
from .arguments import FileArguments

COLUMN = PICTURE_COLUMNS[0]


def check_columns(args: FileArguments, images: bool) -> None:
    """Refuse the column of texts for a model that reads pictures, and the reverse.

    Raises:
        UsageError: naming the flag.
    """
    flag, other, kind = ("text_column", "image", "pictures") if images else ("image_column", "text", "texts")
    value = getattr(args, flag)
    if value is not None:
        raise UsageError(f"The model reads {kind}: name their column with --{other}_column.", field=flag, value=value)


def folder_of(place: str) -> Path:
    """The folder from which names of pictures in a file start."""
    path = Path(place)
    return Path() if place == STDIN else path if path.is_dir() else path.parent


def located(picture: Any, folder: Path) -> Any:
    """A picture; the name of a file as it can be opened from here."""
    if isinstance(picture, str) and (folder / picture).is_file():
        return str(folder / picture)
    return picture


def picture_file(picture: Any) -> str | None:
    """The file that a picture came from, as it was named; `None` for one that came from none."""
    name = picture.get("path") if isinstance(picture, Mapping) else picture
    return name if isinstance(name, str) else None


def picture_column(args: FileArguments, columns: list[str], place: str) -> str:
    """The column of the pictures, or of pixel values.

    Raises:
        DataError: if it is not there.
    """
    chosen = args.image_column
    if chosen is None:
        try:
            return picture_columns(columns)[0]
        except DataError as error:
            raise DataError(f"{place}: {error} Name the column with --image_column.", field="image_column") from error
    if chosen not in columns:
        raise DataError(
            f"{place} has no column {chosen!r}; it has {', '.join(columns)}.", field="image_column", value=chosen
        )
    return chosen


def undecoded(rows: Dataset) -> Dataset:
    """The same rows, their pictures left as the files that they are."""
    for name, feature in rows.features.items():
        if isinstance(feature, Image) and feature.decode:
            rows = rows.cast_column(name, Image(decode=False))
    return rows


def with_pictures(rows: Dataset, args: FileArguments, place: str) -> Dataset:
    """Rows whose one column of pictures is called "image"; names of files start from here.

    Raises:
        DataError: for rows without pictures, or a column that holds something else.
    """
    rows = undecoded(rows)
    column = picture_column(args, rows.column_names, place)
    rows = rows.remove_columns([name for name in (PIXELS, *PICTURE_COLUMNS) if name in rows.column_names and name != column])
    if column == PIXELS:
        return rows
    feature = rows.features[column]
    if getattr(feature, "dtype", None) in ("string", "large_string"):
        folder = folder_of(place)
        names = [located(name, folder) for name in rows[column]]
        return rows.remove_columns(column).add_column(COLUMN, names)
    if not isinstance(feature, Image) and not (isinstance(feature, dict) and {"bytes", "path"} & set(feature)):
        kind = getattr(feature, "dtype", type(feature).__name__)
        raise DataError(
            f"The column {column!r} of {place} holds {kind}; expected pictures, or names of their files. Name another with "
            "--image_column.",
            field="image_column",
        )
    return rows if column == COLUMN else rows.rename_column(column, COLUMN)


def named_pictures(rows: Dataset) -> list[Any]:
    """The pictures of rows from `with_pictures`, unopened."""
    return list(rows[COLUMN])
