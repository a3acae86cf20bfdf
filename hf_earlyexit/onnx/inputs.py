"""What an exported graph reads, by name: token ids of texts, or pixel values of pictures of one size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..families.base import IMAGE
from ..families.checks import check_width, picture_of
from ..modeling.protocol import TorchExitClassifier
from ..serving.pictures import encode_picture
from ..serving.tables import PIXELS

IDS = ("input_ids", "attention_mask", "token_type_ids")
CURE = "Prepare pictures with the image processor that the model was exported with, or export it again for this size."


def picture_shape(model: TorchExitClassifier, image_processor: Any) -> tuple[int, ...] | None:
    """Channels, height and width of the pictures that an export is made for; `None` for models that read texts.

    Args:
        model: a classifier with exits.
        image_processor: tells the size; the model's config does without one.

    Raises:
        UsageError: for an image processor of a model that reads texts, or one that makes pictures the model does not take.
    """
    if model.family.task != IMAGE:
        if image_processor is not None:
            raise UsageError(
                f"image_processor is given, and {type(model).__name__} reads texts: pass tokenizer=...",
                field="image_processor",
            )
        return None
    shape = picture_of(model.config)
    if image_processor is None:
        return shape
    from PIL import Image

    pixels = encode_picture(Image.new("RGB", shape[:0:-1]), image_processor, "A blank picture")
    try:
        model.family.check(model.family, model.base_model, {PIXELS: pixels[None]})
    except DataError as error:
        raise UsageError(
            f"The image processor makes other pictures than the model takes: {error}", field="image_processor"
        ) from error
    return tuple(pixels.shape)


def check_picture(shape: Sequence[int], expected: Sequence[int]) -> str | None:
    """What keeps an export from reading pixel values of a shape, if anything."""
    if tuple(shape) == tuple(expected):
        return None
    return f"has {PIXELS} of shape {list(shape)}; this export takes [channels, height, width] = {list(expected)}. {CURE}"


def picture_batch(given: Mapping[str, Any], expected: Sequence[int]) -> dict[str, Tensor]:
    """Pixel values `[B, channels, height, width]`, checked, by name.

    Args:
        given: inputs by name, of torch or NumPy; `None` where one is not given.
        expected: channels, height and width.

    Raises:
        UsageError: for inputs of texts.
        DataError: telling what came.
    """
    _only(given, (PIXELS,), "pictures")
    pixels = torch.as_tensor(given[PIXELS])
    if pixels.ndim != 4 or (why := check_picture(pixels.shape[1:], expected)):
        why = f"has {PIXELS} of shape {list(pixels.shape)}; expected [pictures, {', '.join(map(str, expected))}]. {CURE}"
        raise DataError(f"The batch {why}", field=PIXELS, value=tuple(pixels.shape))
    if not pixels.is_floating_point():
        raise DataError(
            f"{PIXELS} are of type {pixels.dtype}, which no image processor has prepared; expected floating point numbers.",
            field=PIXELS,
        )
    return {PIXELS: pixels.float()}


def text_batch(given: Mapping[str, Any], vocabulary: int, longest: int, segments: int | None) -> dict[str, Tensor]:
    """Token ids `[B, T]`, their attention mask and token types, checked, by name.

    Args:
        given: inputs by name, of torch or NumPy; `None` where one is not given.
        vocabulary: ids the model knows, 0 to `vocabulary - 1`.
        longest: most tokens the model takes.
        segments: token types the model knows; `None` where it reads none, and passes them over.

    Raises:
        UsageError: for pixel values, or no token ids.
        DataError: for inputs longer than the model takes, of another shape or with numbers that the model does not know.
    """
    _only(given, IDS, "texts")
    ids = _whole("input_ids", given["input_ids"], vocabulary, None)
    mask, types = given.get("attention_mask"), given.get("token_type_ids")
    mask = torch.ones_like(ids) if mask is None else _whole("attention_mask", mask, 2, ids.shape)
    known = types is not None and segments is not None
    token_types = _whole("token_type_ids", types, segments or 0, ids.shape) if known else torch.zeros_like(ids)
    check_width(ids.shape[1], longest)
    return dict(zip(IDS, (ids, mask, token_types), strict=True))


def _only(given: Mapping[str, Any], names: Sequence[str], kind: str) -> None:
    """Refuse inputs of the other kind, and a call without the first of these."""
    other = next((name for name, values in given.items() if values is not None and name not in names), None)
    if other is not None or given.get(names[0]) is None:
        came = "nothing to read" if other is None else other
        raise UsageError(f"The call has {came}; this model reads {kind}: pass {names[0]}=...", field=other or names[0])


def _whole(name: str, values: Any, count: int, shape: Any) -> Tensor:
    """Whole numbers `[B, T]` from 0 to `count - 1`, as int64.

    Raises:
        DataError: telling what came.
    """
    ids = torch.as_tensor(values)
    if ids.ndim != 2 or (shape is not None and ids.shape != shape):
        expected = "[rows, tokens]" if shape is None else str(list(shape))
        raise DataError(f"{name} has shape {list(ids.shape)}; expected {expected}.", field=name)
    whole = not (ids.is_complex() or (ids.is_floating_point() and bool((ids != ids.round()).any())))
    low, high = ids.long().aminmax() if whole and ids.numel() else (0, 0)
    if not whole or low < 0 or high >= count:
        raise DataError(f"{name} holds other numbers than the model knows; expected 0 to {count - 1}.", field=name)
    return ids.long()
