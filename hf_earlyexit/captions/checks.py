"""What a captioner refuses before anything runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..errors import DataError, UsageError


def check_images(images: Any, model: Any, any_size: bool) -> None:
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
    if wanted is not None and not any_size and tuple(images.shape[2:]) != wanted:
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


class Asked(NamedTuple):
    """What a call of `generate` asks for: ids that end a caption, and whether rows keep their places (beams do not)."""

    ends: tuple[int, ...]
    rows_stay: bool


def check_generation(model: Any, settings: Any, given: dict[str, Any], early: bool, wants_layers: bool) -> Asked:
    """Refuse settings of `generate` that cannot work.

    Args:
        model: the captioner.
        settings: a generation config; `None` for the model's own.
        given: keyword arguments of the call.
        early: whether tokens may leave early.
        wants_layers: whether exit layers are asked for.

    Raises:
        DataError: if no start or padding token is set.
        UsageError: for early exit without a cache, or with an assistant.
    """
    settings = settings or model.generation_config

    def value(name: str) -> Any:
        return given[name] if name in given else getattr(settings, name, None)

    if value("decoder_start_token_id") is None and value("bos_token_id") is None and given.get("decoder_input_ids") is None:
        raise DataError(
            "No start token: set model.generation_config.decoder_start_token_id to the id that captions begin with.",
            field="decoder_start_token_id",
        )
    if value("pad_token_id") is None:
        raise DataError(
            "No padding token: set model.generation_config.pad_token_id, to the id that ends captions if there is no other.",
            field="pad_token_id",
        )
    if early and value("use_cache") is False:
        raise UsageError(
            "Early exit decodes over a cache; leave use_cache out, or pass early_exit=False.", field="use_cache"
        )
    assisted = value("prompt_lookup_num_tokens") is not None or given.get("assistant_model") is not None
    if assisted and (early or wants_layers):
        raise UsageError(
            "An assistant proposes several tokens at once, which early exit cannot take; pass early_exit=False and leave "
            "return_exit_layers out.",
            field="assistant_model",
        )
    ends = value("eos_token_id")
    ends = () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)
    return Asked(ends, (value("num_beams") or 1) == 1)
