"""What a captioner refuses before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

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


def generation_settings(model: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """What a call of `generate` goes by: its arguments, then its generation config, then the model's own.

    Args:
        model: the captioner.
        options: arguments of `generate` by name.

    Raises:
        UsageError: for a generation config that is none.
    """
    given = options.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise UsageError(
            f"generation_config is {type(given).__name__}; expected a GenerationConfig, or its values as keywords.",
            field="generation_config",
            value=type(given).__name__,
        )
    settings, _ = model._prepare_generation_config(**{**options, "generation_config": given})
    return settings


def check_generation(settings: GenerationConfig, options: Mapping[str, Any], early: bool, wants_layers: bool) -> None:
    """Refuse settings of `generate` that cannot work.

    Args:
        settings: from `generation_settings`.
        options: arguments of the call by name.
        early: whether tokens may leave early.
        wants_layers: whether exit layers are asked for.

    Raises:
        DataError: if no start or padding token is set.
        UsageError: for what captioners cannot use; for early exit over a cache that it cannot use, or with a way of decoding
            other than greedy search, sampling and beam search.
    """
    if (
        settings.decoder_start_token_id is None
        and settings.bos_token_id is None
        and not _given(options, "decoder_input_ids")
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
    for name in ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"):
        value = options.get(name, getattr(settings, name, None))
        if value is not None and not (name == "guidance_scale" and value == 1):
            raise UsageError(
                f"{name} steers away from a text prompt, which captioners do not read; leave it out.", field=name
            )
    if early or wants_layers:
        _check_way(settings, options)
    if not early:
        return
    if settings.use_cache is False:
        raise UsageError(
            "Early exit decodes over a cache; leave use_cache out, or pass early_exit=False.", field="use_cache"
        )
    if settings.cache_implementation not in (None, "dynamic"):
        raise UsageError(
            f"cache_implementation is {settings.cache_implementation!r}; rows leave at different layers, so early exit "
            "needs the dynamic cache. Leave cache_implementation out, or pass early_exit=False.",
            field="cache_implementation",
            value=settings.cache_implementation,
        )
    if getattr(settings, "prefill_chunk_size", None) is not None:
        raise UsageError(
            "prefill_chunk_size runs a prompt in parts; with early exit it runs whole. Leave it out, or pass "
            "early_exit=False.",
            field="prefill_chunk_size",
            value=settings.prefill_chunk_size,
        )


ONE_BY_ONE = ("greedy_search", "sample", "beam_search", "beam_sample")
ASSISTANTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
OTHER_WAYS = ("custom_generate", "constraints", "force_words_ids", "penalty_alpha", "num_beam_groups", "dola_layers")


def _check_way(settings: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Refuse ways of decoding that do not write one token of each row after the other."""
    way = settings.get_generation_mode(options.get("assistant_model")).value
    asked = [name for name in (*ASSISTANTS, *OTHER_WAYS) if _given(options, name) or _given(vars(settings), name)]
    if any(name in ASSISTANTS for name in asked):
        raise UsageError(
            f"An assistant ({asked[0]}) proposes several tokens at once, which early exit cannot take; pass "
            "early_exit=False and leave return_exit_layers out.",
            field=asked[0],
        )
    if way not in ONE_BY_ONE or "custom_generate" in asked:
        raise UsageError(
            f"{asked[0] if asked else way} asks for another way of decoding ({way}); early exit takes greedy search, "
            "sampling and beam search. Pass early_exit=False and leave return_exit_layers out.",
            field=asked[0] if asked else "generation_config",
        )


def _given(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name)
    return value is not None and value is not False and not (name == "num_beam_groups" and value == 1)
