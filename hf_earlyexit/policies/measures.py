"""How sure one exit is of each row, from its logits alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem_types import MULTI_LABEL, largest


def max_probability(log_probs: Tensor) -> Tensor:
    """Probability of the most likely class, `[..., C]` to `[...]`, in `[1/C, 1]`."""
    return log_probs.amax(-1).exp()


def top_two(values: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The largest and the second of `[..., C]`, `[...]` each; `topk` takes several times as long.

    Args:
        values: of the classes.
        first: the class of the largest `[...]`, where it is known.
    """
    if values.shape[-1] == 2:
        one, other = values.unbind(-1)
        return torch.maximum(one, other), torch.minimum(one, other)
    place = (largest(values) if first is None else first)[..., None]
    return values.gather(-1, place)[..., 0], values.scatter(-1, place, -math.inf).amax(-1)


def margin(log_probs: Tensor) -> Tensor:
    """Probability of the first class minus that of the second, in `[0, 1]`."""
    first, second = top_two(log_probs)
    return first.exp() - second.exp()


def certainty(log_probs: Tensor) -> Tensor:
    """One minus the entropy over its maximum log C, in `[0, 1]`; finite also where probabilities vanish."""
    entropy: Tensor = torch.special.entr(log_probs.exp()).sum(-1)
    return (1 - entropy / math.log(log_probs.shape[-1])).clamp_min(0)


def log_odds(values: Tensor, first: Tensor | None = None) -> Tensor:
    """Log-odds of the first class against the second, at or above 0 and without upper bound.

    Args:
        values: log-probabilities or logits; all classes of a row may be shifted alike.
        first: see `top_two`.
    """
    most, second = top_two(values, first)
    return most - second


def probability(log_odds: Tensor) -> Tensor:
    """What has these log-odds, in `[0, 1]`; unlike `sigmoid`, the same to the bit in every batch size."""
    chance: Tensor = 1 / (1 + torch.exp(-log_odds))
    return chance


def measure(logits: Tensor, how: Callable[[Tensor], Tensor], problem_type: str) -> Tensor:
    """Apply a measure to the rows of one exit in float32.

    With many labels each label is a two-class problem of its own and the row is as sure as its least sure label.

    Args:
        logits: `[B, C]`, any float dtype.
        how: a function of log-probabilities above.
        problem_type: single or multi label.

    Returns:
        `[B]`, float32.
    """
    logits = logits.float()
    if problem_type == MULTI_LABEL:
        pairs = torch.stack([logits, torch.zeros_like(logits)], -1)  # [B, C, 2]
        return how(pairs.log_softmax(-1)).amin(-1)
    return how(logits.log_softmax(-1))
