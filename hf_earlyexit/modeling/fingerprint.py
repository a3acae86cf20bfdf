"""Short names for the exact weights of the exits, the numbers of a policy and the vocabulary of a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NEW_PARTS = ("exit_heads.", "exit_gates.", "exit_shortlist")
DECODER_HEADS = ("decoder.lm_head.", "decoder.transformer.ln_f.", "decoder.cls.")
HEAD_PREFIXES = (*NEW_PARTS, "classifier.", *DECODER_HEADS)


def heads_fingerprint(model: Any, dtype: torch.dtype = torch.float32) -> str:
    """Sixteen hex digits of all heads' and gates' values, the same in every float dtype that holds them.

    Thresholds belong to the heads they were chosen on; equal fingerprints say that these are the same heads.

    Args:
        model: a model with exits; an exported one tells its own `fingerprint`.
        dtype: round the values to it first.
    """
    if (told := getattr(model, "fingerprint", None)) is not None:
        return told
    return tensors_fingerprint(model.state_dict(), dtype)


def tensors_fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> str:
    """The `heads_fingerprint` of the model that these named tensors are the state of."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if name.startswith(HEAD_PREFIXES):
            digest.update(name.encode())
            digest.update(tensor.detach().to("cpu", dtype).to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Sixteen hex digits of a tokenizer's vocabulary: its tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def policy_fingerprint(policy: dict[str, Any]) -> str:
    """Sixteen hex digits of a policy's name and numbers, as `policy.to_dict()` gives them."""
    return hashlib.sha256(json.dumps(policy, sort_keys=True).encode()).hexdigest()[:16]
