"""Captions as a captioner learns them: what is wrong with them in words, and what the decoder reads to write them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder import shift_tokens_right

from ..errors import DataError, TrainingError
from ..labels import LEFT_OUT
from ..modeling.protocol import TorchExitWriter
from ..values import is_whole, shown


def read_caption_labels(values: Any, decoder: Any, images: Any = None, inputs: Any = None) -> Tensor:
    """Check the labels of captions and give them as losses take them, int64 `[B, T]`.

    Args:
        values: tensor, array or lists of token ids; -100 where nothing is learned.
        decoder: the decoder's config; `vocab_size` and the number of positions are read.
        images: pixel values of the same rows `[B, ...]`, where they are given.
        inputs: what the decoder reads `[B, T]`, where that is given.

    Raises:
        DataError: for another type or shape, more tokens than the decoder has positions, an id out of range, or labels of
            other rows or tokens than images and inputs.
    """
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(f"are {type(values).__name__}", "token ids [B, T], rows padded with -100") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise _wrong(f"are of type {str(labels.dtype).removeprefix('torch.')}", "token ids, whole numbers")
    if labels.ndim != 2 or not labels.numel():
        raise _wrong(f"have the shape {list(labels.shape)}", "[B, T], at least one token of one caption")
    longest = getattr(decoder, "max_position_embeddings", None)
    if longest is not None and labels.shape[1] > longest:
        raise _wrong(f"have {labels.shape[1]} tokens a row", f"at most {longest}, the positions of the decoder")
    for name, other, size in (("pixel_values", images, 1), ("decoder_input_ids", inputs, 2)):
        if other is not None and other.shape[:size] != labels.shape[:size]:
            raise _wrong(f"have the shape {list(labels.shape)}, {name} {list(other.shape)}", "a row and token for each")
    labels = labels.long()
    outside = (labels != LEFT_OUT) & ((labels < 0) | (labels >= decoder.vocab_size))
    if bool(outside.any()):
        row, place = outside.nonzero()[0].tolist()
        value = int(labels[row, place])
        raise _wrong(
            f"have {value} in row {row} at token {place}",
            f"0 to {decoder.vocab_size - 1}, or -100 to leave a token out",
            value,
        )
    return labels


def _wrong(fault: str, expected: str, value: Any = None) -> DataError:
    return DataError(f"The labels of the captions {fault}; expected {expected}.", field="labels", value=value)


def decoder_inputs(labels: Tensor, model: TorchExitWriter) -> Tensor:
    """What the decoder reads to write these captions: the start token, then all but the last, int64 `[B, T]`.

    The start and padding tokens are those of `model.config`, and where it has none those that `generate` goes by.

    Args:
        labels: from `read_caption_labels`.
        model: the captioner.

    Raises:
        TrainingError: if a token is set nowhere, or is none of the vocabulary.
    """
    pad, start = _token(model, "pad_token_id"), _token(model, "decoder_start_token_id")
    shifted: Tensor = shift_tokens_right(labels, pad, start)
    return shifted


def _token(model: TorchExitWriter, name: str) -> int:
    places = ("config", "generation_config")
    values = {place: getattr(getattr(model, place), name, None) for place in places}
    place, value = next(((place, value) for place, value in values.items() if value is not None), ("config", None))
    if value is None:
        raise TrainingError(
            f"model.config.{name} is not set, nor is that of generation_config; captions are shifted by it. Set it to the "
            "tokenizer's.",
            field=name,
        )
    if not is_whole(value, 0, model.config.decoder.vocab_size - 1):
        raise TrainingError(
            f"model.{place}.{name} is {shown(value)}; expected the number of a token, 0 to "
            f"{model.config.decoder.vocab_size - 1}.",
            field=name,
            value=value,
        )
    return int(value)
