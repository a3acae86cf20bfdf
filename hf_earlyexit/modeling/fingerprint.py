"""Short names for all that a model's answers depend on, for the numbers of a policy and the vocabulary of a tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..errors import CheckpointError
from ..values import json_sum
from .protocol import ExitModel, TorchExitModel

NEW_PARTS = ("exit_heads.", "exit_gates.", "exit_shortlist")
THREADS = 4
# Settings that change no answer: what training does, what is put out beside the answers, where a model comes from, and what
# has a check of its own. Every other one counts, unknown ones too.
TRAINING = (
    "dropout",
    "dropout_prob",
    "pdrop",
    "layerdrop",
    "initializer_range",
    "initializer_factor",
    "gradient_checkpointing",
)
OUTPUT = ("return_dict", "output_hidden_states", "output_attentions", "use_cache", "chunk_size_feed_forward")
ORIGIN = ("transformers_version", "architectures", "auto_map", "name_or_path", "commit_hash", "dtype", "model_type")
LABELS = ("id2label", "label2id", "num_labels", "problem_type", "finetuning_task")
EXITS = (
    "exit_policy",
    "exit_certificate",
    "exit_operating_points",
    "exit_point_certificates",
    "exit_forms",
    "exit_tokenizer",
    "exit_cost",
    "exit_drafts",
    "early_exit_version",
)


def model_fingerprint(model: ExitModel, dtype: torch.dtype = torch.float32) -> str:
    """Sixteen hex digits of all weights of a model and of the settings that its answers depend on.

    Thresholds belong to the model they were chosen on; equal fingerprints say that it is the same, in every float dtype that
    holds its weights. One processor core reads about 1.2 GB of weights a second.

    Args:
        model: a model with exits, compiled or not; an exported one has its own `fingerprint`.
        dtype: round the weights to it first.

    Raises:
        CheckpointError: for a model without weights of its own.
    """
    if (known := getattr(model, "fingerprint", None)) is not None:
        return str(known)
    inner: Any = getattr(model, "_orig_mod", model)
    return state_fingerprint(answering_state(inner), inner.config, dtype)


def answering_state(model: TorchExitModel) -> dict[str, Tensor]:
    """All weights and buffers that are saved, by name; of those that are one and the same, one."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


def state_fingerprint(tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype = torch.float32) -> str:
    """The `model_fingerprint` of the model with this state and config; the order of the tensors does not matter.

    Raises:
        CheckpointError: for no tensors.
    """
    if not tensors:
        raise CheckpointError(
            "The model has no weights to take a fingerprint of; pass the model with exits itself.", field="model"
        )
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        sums = pool.map(lambda name: _tensor_sum(tensors[name], dtype), names := sorted(tensors))
        lines = [f"{name} {digest}" for name, digest in zip(names, sums, strict=True)]
    return short_sum([lines, answering_settings(config)])


def answering_settings(config: Any) -> dict[str, Any]:
    """The settings that answers depend on and that differ from their defaults, by name; those of parts as `part.name`.

    Defaults are left out, so that settings added by a newer transformers change nothing.
    """
    parts = {name: value for name, value in vars(config).items() if isinstance(value, PretrainedConfig)}
    fields = {field.name: field for field in dataclasses.fields(config)}
    settings_by_name = {
        name: value
        for name, value in json.loads(json.dumps(config.to_dict(), default=str)).items()
        if name not in parts and value is not None and not _is_silent(name) and value != _default(fields.get(name))
    }
    for part, settings in parts.items():
        settings_by_name |= {f"{part}.{name}": value for name, value in answering_settings(settings).items()}
    return settings_by_name


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hex digits of a tokenizer's vocabulary: its tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def policy_fingerprint(policy: dict[str, Any]) -> str:
    """Sixteen hex digits of a policy's name and numbers, as `policy.to_dict()` gives them."""
    return short_sum(policy)


def short_sum(values: Any) -> str:
    """Sixteen hex digits of JSON values, whatever the order of their keys."""
    return json_sum(values)[:16]


def _tensor_sum(tensor: Tensor, dtype: torch.dtype) -> str:
    """Of a tensor's shape and values."""
    values = tensor.detach().cpu()
    if values.is_floating_point():
        values = values.to(dtype).to(torch.float32)
    digest = hashlib.sha256(str(list(values.shape)).encode())
    digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()


def _is_silent(name: str) -> bool:
    name = name.removeprefix("_")
    return name in (*OUTPUT, *ORIGIN, *LABELS, *EXITS) or name.endswith(TRAINING)


def _default(field: dataclasses.Field[Any] | None) -> Any:
    if field is None:
        return None
    if field.default_factory is not dataclasses.MISSING:
        return json.loads(json.dumps(field.default_factory(), default=str))
    return None if field.default is dataclasses.MISSING else json.loads(json.dumps(field.default, default=str))
