"""Pictures from files, opened with care."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


def open_image(image: Any, field: str = "images") -> Image:
    """An image in RGB, turned upright: the one way by which pictures come in, for training, calibration and answers alike.

    Transparency is dropped, and of 16 bits a colour the upper 8 are kept.

    Args:
        image: a file, a PIL image, an array `[height, width]` or `[height, width, channels]` of bytes, or what an undecoded
            `datasets` column holds: a mapping with `bytes` or `path`.
        field: the argument or column it came by, for errors.

    Raises:
        DataError: for anything else, and for a file that is missing, cut short or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(image, Mapping):
        inside = image.get("bytes")
        image = io.BytesIO(inside) if isinstance(inside, bytes) else image.get("path")
    is_name = isinstance(image, (str, PathLike))
    if isinstance(image, str) and image.startswith(("http://", "https://", "data:")):
        raise DataError(f"{image[:80]!r} is an address; download the picture and name the file.", field=field)
    if not is_name and not isinstance(image, (Image.Image, np.ndarray, io.BytesIO)):
        raise DataError(
            f"A picture is given as {type(image).__name__}; expected the name of a file, a PIL image, an array, or a "
            "mapping with bytes or path.",
            field=field,
            value=type(image).__name__,
        )
    try:
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        source: Any = nullcontext(image) if isinstance(image, Image.Image) else Image.open(image)
        with source as opened:
            if opened.format == "EPS":
                raise ValueError("it is PostScript, a program that Pillow has Ghostscript run")
            if 0 in opened.size:
                raise ValueError("it is {} x {} pixels large".format(*opened.size))
            return _in_bytes(ImageOps.exif_transpose(opened)).convert("RGB")  # this reads all of the file
    except FileNotFoundError as error:
        raise DataError(f"There is no picture {image}; check the name.", field=field, path=image) from error
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        place = image if is_name else "The picture"
        why = "it is of no kind that it knows" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(
            f"{place} is no picture that Pillow can read ({why}); expected a whole JPEG, PNG or the like.",
            field=field,
            path=image if is_name else None,
        ) from error


def _in_bytes(image: Image) -> Image:
    """The same with 8 bits a colour: Pillow itself would make white of all that is above 255.

    Raises:
        ValueError: for values whose range nobody knows.
    """
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no range of its own; convert it to 8 bits a colour first")
    return image


def embedded(image: Any, longest_side: int) -> str:
    """A picture as the address of an `<img>`, small and written anew: no place or camera that a photo names goes along.

    Args:
        image: as for `open_image`.
        longest_side: in pixels, at most.
    """
    small = open_image(image)
    small.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def picture_name(picture: Any) -> str | None:
    """The name of a file without its folder; `None` for a picture that came from none."""
    return Path(picture).name if isinstance(picture, (str, PathLike)) else None
