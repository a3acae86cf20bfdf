"""Pictures from files, opened with care."""

from __future__ import annotations

from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def open_picture(picture: str | PathLike[str] | Image) -> Image:
    """A picture in RGB, turned upright.

    Args:
        picture: a file, or a PIL image.

    Raises:
        DataError: for anything else, and for a file that is missing, cut short or no picture.
    """
    from PIL import Image, ImageOps

    is_name = isinstance(picture, (str, PathLike))
    if not is_name and not isinstance(picture, Image.Image):
        raise DataError(
            f"A picture is given as {type(picture).__name__}; expected the name of a file, or a PIL image.",
            field="images",
            value=type(picture).__name__,
        )
    if isinstance(picture, str) and picture.startswith(("http://", "https://", "data:")):
        raise DataError(f"{picture[:80]!r} is an address; download the picture and name the file.", field="images")
    try:
        source: Any = Image.open(picture) if isinstance(picture, (str, PathLike)) else nullcontext(picture)
        with source as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")  # this reads all of the file
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {picture}; check the name.", field="images", path=picture) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        place = picture if is_name else "A PIL image"
        raise DataError(
            f"{place} is no picture that Pillow can read ({error}); expected a whole JPEG, PNG or the like.",
            field="images",
            path=picture if is_name else None,
        ) from error


def picture_name(picture: Any) -> str | None:
    """The name of a file without its folder; `None` for a picture that came from none."""
    return Path(picture).name if isinstance(picture, (str, PathLike)) else None
