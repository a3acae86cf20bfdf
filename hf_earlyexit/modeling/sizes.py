"""Settings of a config.json that no model can have, refused before anything is allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.activations import ACT2FN

from ..errors import EarlyExitConfigError
from ..registry import unknown_name
from ..values import MOST_LAYERS, is_real, is_whole, unexpected

MOST_LABELS = 1 << 20
SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    "hidden_size": 1 << 20,
    "embedding_size": 1 << 20,
    "intermediate_size": 1 << 22,
    "num_attention_heads": 1 << 14,
    "vocab_size": 1 << 25,
    "max_position_embeddings": 1 << 25,
    "type_vocab_size": 1 << 16,
    "num_channels": 1 << 10,
    "image_size": 1 << 16,
    "patch_size": 1 << 16,
    "hidden_sizes": 1 << 20,
    "depths": MOST_LAYERS,
}
MAY_BE_NONE = ("type_vocab_size",)  # DeBERTa has no segments
CHANCES = ("dropout", "dropout_prob", "pdrop")
EPSILONS = ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps")
ACTIVATIONS = ("hidden_act", "activation_function", "activation", "hidden_activation")
OWN_HEAD_SIZE = ("head_dim", "attention_head_size", "embedding_size", "d_kv")  # with one, heads need not divide the width
BITS_APART, SLACK = 4, 1 << 26  # weights in 2 bits; new heads


def check_raw(values: dict[str, Any], place: str = "") -> None:
    """Refuse values that transformers would work on for hours, or stumble over, before it makes a config of them.

    Args:
        values: fields by name, as JSON or a caller gives them; those of parts are looked at as well.
        place: where they stand, for errors, such as "decoder.".

    Raises:
        EarlyExitConfigError: naming the field.
    """
    labels = values.get("num_labels")
    if labels is not None and not is_whole(labels, 0, MOST_LABELS):
        raise wrong(f"{place}num_labels", labels, f"a whole number up to {MOST_LABELS:,}")
    names = values.get("id2label")
    if isinstance(names, dict) and not all(str(number).isdecimal() for number in names):
        raise wrong(f"{place}id2label", names, "an object with class numbers, 0 and up, as its names")
    for name in ("dtype", "torch_dtype"):
        dtype = values.get(name)
        known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype not in (None, "auto") and not isinstance(known, (torch.dtype, dict)):  # a dict has one for each part
            raise wrong(f"{place}{name}", dtype, "a type such as 'float32' or 'bfloat16'")
    kind = values.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise wrong(f"{place}model_type", kind, "a name such as 'early_exit_bert'")
    for part, inner in values.items():
        if isinstance(inner, dict) and "model_type" in inner:
            check_raw(inner, f"{place}{part}.")


def check_sizes(config: Any, place: str = "") -> None:
    """Refuse sizes and rates that no model can have, in a config and its parts.

    Args:
        config: any config of transformers.
        place: as in `check_raw`.

    Raises:
        EarlyExitConfigError, UnknownNameError: naming the field, its value and what is allowed.
    """
    for name, most in SIZES.items():
        value = getattr(config, name, None)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            least = 0 if name in MAY_BE_NONE else 1
            if number is not None and not is_whole(number, least, most):
                raise wrong(place + name, value, f"a whole number from {least} to {most:,}")
    for name, value in vars(config).items():
        if name.endswith(CHANCES) and value is not None and not is_real(value, 0, 1):
            raise wrong(place + name, value, "a chance from 0 to 1")
        if name in EPSILONS and not is_real(value, 0, 1):
            raise wrong(place + name, value, "a small number above 0")
        if name in ACTIVATIONS and isinstance(value, str) and value not in ACT2FN:
            raise unknown_name(place + name, value, ACT2FN)
        if name == "initializer_range" and not is_real(value, 0, 1e3):
            raise wrong(place + name, value, "a number of at least 0")
        if isinstance(value, PretrainedConfig):
            check_sizes(value, f"{place}{name}.")
    _check_together(config, place)


def check_room(config: Any, folder: Any) -> None:
    """Refuse a config that asks for many times the weights that lie beside it: one of its sizes cannot be right.

    Args:
        config: just read.
        folder: where from; anything but a folder with weights is let through.

    Raises:
        EarlyExitConfigError: naming the largest size.
    """
    check_sizes(config)  # values given beside the folder came after the config had checked itself
    files = list(Path(folder).glob("*.safetensors")) if isinstance(folder, (str, Path)) and Path(folder).is_dir() else []
    stored = sum(file.stat().st_size for file in files)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PretrainedConfig))]
    least = sum(map(_fewest_weights, parts))
    if files and least > BITS_APART * stored + SLACK:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        sizes = ", ".join(f"{name} {value:,}" for name in names for part in parts if (value := _size(part, name)))
        raise wrong(
            "hidden_size",
            _size(config, "hidden_size"),
            f"sizes that fit the {stored:,} bytes of weights beside it: these ask for {least:,} weights ({sizes})",
        )


def wrong(field: str, value: Any, expected: str) -> EarlyExitConfigError:
    """The error that names a config field, its value and what is allowed."""
    return unexpected(field, value, expected, EarlyExitConfigError)


def _check_together(config: Any, place: str) -> None:
    """Refuse sizes that do not fit each other."""
    width, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    if width and heads and width % heads and not any(getattr(config, name, None) for name in OWN_HEAD_SIZE):
        raise wrong(f"{place}num_attention_heads", heads, f"a number that divides hidden_size, {width}")
    pad, words = getattr(config, "pad_token_id", None), _size(config, "vocab_size")
    if pad is not None and words and not is_whole(pad, -words, words - 1):
        raise wrong(f"{place}pad_token_id", pad, f"a token's number below vocab_size, {words}")
    picture, patch = _size(config, "image_size"), _size(config, "patch_size")
    if picture and patch and patch > picture:
        raise wrong(f"{place}patch_size", patch, f"at most image_size, {picture}")


def _fewest_weights(config: Any) -> int:
    """What a transformer of these sizes has at least; several layers may be the same."""
    width, inner, layers = (_size(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    shared = hasattr(config, "num_hidden_groups")
    narrow = _size(config, "embedding_size") or width
    return _size(config, "vocab_size") * narrow + 2 * width * (inner or width) * (1 if shared else max(layers, 1))


def _size(config: Any, name: str) -> int:
    """A size, 0 where there is none or it is no single number."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
