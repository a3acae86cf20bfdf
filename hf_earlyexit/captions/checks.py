"""What a captioner refuses before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..errors import DataError, UsageError
from ..generation.checks import GUIDANCE, is_given

if TYPE_CHECKING:
    from .model import EarlyExitVisionEncoderDecoder


def check_pixel_values(images: Any, model: EarlyExitVisionEncoderDecoder, any_size: bool) -> None:
    """Refuse what the encoder cannot look at.

    Args:
        images: expected `[B, channels, height, width]`.
        model: the captioner.
        any_size: whether the encoder was told to adapt its positions.

    Raises:
        DataError: naming what came and what the encoder takes.
    """
    if images is None:
        raise DataError("No images: pass pixel_values, as the image processor makes them.", field="pixel_values")
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        came = f"{list(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(
            f"pixel_values is {came}; expected floats [images, channels, height, width]. Pass pictures through the image "
            "processor first.",
            field="pixel_values",
        )
    if len(images) == 0:
        raise DataError("pixel_values holds no image; expected at least one.", field="pixel_values")
    encoder = model.config.encoder
    channels, size = getattr(encoder, "num_channels", None), getattr(encoder, "image_size", None)
    if channels is not None and images.shape[1] != channels:
        raise DataError(
            f"The images have {images.shape[1]} channels; the encoder takes {channels}.",
            field="pixel_values",
            value=images.shape[1],
        )
    wanted = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
    if wanted is not None and not any_size and tuple(images.shape[2:]) != wanted and not _takes_size(model.encoder, images):
        raise DataError(
            f"The images are {images.shape[2]} x {images.shape[3]}; the encoder takes {wanted[0]} x {wanted[1]}. Let its "
            "image processor resize them, or pass interpolate_pos_encoding=True.",
            field="pixel_values",
            value=tuple(images.shape[2:]),
        )
    if images.device != model.device:
        raise DataError(
            f"The images are on {images.device}, the model on {model.device}; move one to the other.", field="pixel_values"
        )


def _takes_size(encoder: Any, images: Tensor) -> bool:
    """Whether an encoder adapts to the size of images by itself: its embeddings, all that knows it, are tried on one."""
    try:
        with torch.no_grad():
            encoder.embeddings(images[:1].to(encoder.device, encoder.dtype))
    except (ValueError, RuntimeError):
        return False
    except (AttributeError, TypeError):  # another way to embed; whoever runs the encoder will see
        return True
    return True


def check_caption_tokens(settings: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Refuse what captions cannot be written with.

    Args:
        settings: what the call of `generate` goes by.
        options: arguments of the call by name.

    Raises:
        DataError: if no start or padding token is set.
        UsageError: for what captioners cannot use.
    """
    if (
        settings.decoder_start_token_id is None
        and settings.bos_token_id is None
        and not is_given(options, "decoder_input_ids")
    ):
        raise DataError(
            "No start token: set model.generation_config.decoder_start_token_id to the id that captions begin with.",
            field="decoder_start_token_id",
        )
    if settings.pad_token_id is None:
        raise DataError(
            "No padding token: set model.generation_config.pad_token_id, to the id that ends captions if there is no other.",
            field="pad_token_id",
        )
    for name in GUIDANCE:
        value = options.get(name, getattr(settings, name, None))
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise UsageError(
                f"{name} steers away from a text prompt, which captioners do not read; leave it out.", field=name
            )
