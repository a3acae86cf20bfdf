"""What models cannot read, refused in words before any layer runs."""

from __future__ import annotations

from typing import Any

from ..errors import DataError, UsageError
from .base import Family

FITTED = "interpolate_pos_encoding"  # whether positions are fitted to images of another size


def check_text(family: Family, model: Any, inputs: dict[str, Any]) -> None:
    """Refuse inputs that a text model cannot read.

    Raises:
        UsageError: for attention whose masks cannot be cut, and for none or two of `input_ids` and `inputs_embeds`.
        DataError: for inputs of a length that the model does not take.
    """
    if model.config._attn_implementation == "flex_attention":  # before its mask, which takes a compilation
        raise UsageError(
            "Attention 'flex_attention' has no plain mask, so finished rows cannot be dropped; "
            "load the model with attn_implementation='sdpa' or 'eager'.",
            field="attn_implementation",
        )
    given, embedded = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (given is None) == (embedded is None):
        raise UsageError("Give exactly one of input_ids and inputs_embeds.", field="input_ids")
    rows = given if embedded is None else embedded
    assert rows is not None  # one of them is given
    check_width(rows.shape[1], family.longest(model.config))


def check_width(tokens: int, limit: int) -> None:
    """Refuse inputs of a length that the model does not take.

    Args:
        tokens: of the inputs, padding included.
        limit: most tokens that the model takes.

    Raises:
        DataError: telling both.
    """
    if not 1 <= tokens <= limit:
        raise DataError(
            f"The input is {tokens} tokens long; this model takes 1 to {limit}. "
            "Pass truncation=True to the tokenizer, or split the text.",
            field="input_ids",
            value=tokens,
        )


def check_images(family: Family, model: Any, inputs: dict[str, Any]) -> None:
    """Refuse what is not a batch of images of the model's channels and, where its positions are not fitted, of its size.

    Raises:
        DataError: telling what came and what is expected.
    """
    fitted = FITTED in family.inputs and inputs.get(FITTED)
    _check_pixels(model, inputs, None if fitted else picture_of(model.config)[1:])


def check_images_of_any_size(family: Family, model: Any, inputs: dict[str, Any]) -> None:
    """As `check_images`, for models that fit their positions to every image."""
    _check_pixels(model, inputs, None)


def picture_of(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of the pictures that a config is made for."""
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return config.num_channels, height, width


def _check_pixels(model: Any, inputs: dict[str, Any], sides: tuple[int, ...] | None) -> None:
    pixels, channels = inputs.get("pixel_values"), model.config.num_channels
    shape = None if pixels is None else tuple(pixels.shape)
    if shape is None or len(shape) != 4 or shape[1] != channels or (sides is not None and shape[2:] != sides):
        height, width = sides or ("height", "width")
        raise DataError(
            f"pixel_values has shape {shape and list(shape)}; expected [images, {channels}, {height}, {width}]. Prepare "
            "images with the model's own image processor.",
            field="pixel_values",
            value=shape,
        )
