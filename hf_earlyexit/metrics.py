"""How far an exit's confidence can be believed, and how many layers a row needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DataError
from .problem_types import MULTI_LABEL, REGRESSION
from .trace import ExitTrace


class Reliability(NamedTuple):
    """Confidence against accuracy in bins of equal width, from 0 to 1.

    Attributes:
        confidence: mean largest probability in each bin that holds rows, ascending.
        accuracy: share of right answers in the same bins.
        share: share of all rows in the same bins.
        ece: expected calibration error: mean gap between the two, weighted by share; in `[0, 1]`.
    """

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    share: tuple[float, ...]
    ece: float


def reliability(logits: Tensor, labels: Tensor, num_bins: int = 10) -> Reliability:
    """Compare what one exit believes of its answers with how often they are right.

    Args:
        logits: `[N, C]`, one label a row.
        labels: `[N]` class numbers.
        num_bins: bins of confidence, at least 1.

    Raises:
        DataError: for no rows or no bins.
    """
    if not len(logits) or num_bins < 1:
        raise DataError(f"{len(logits)} rows in {num_bins} bins; expected at least one of each.", field="logits")
    confidence, said = logits.double().softmax(-1).max(-1)
    right = (said == labels).double()
    place = (confidence * num_bins).long().clamp(max=num_bins - 1)
    count = torch.bincount(place, minlength=num_bins).double()
    filled = count > 0
    believed = torch.bincount(place, confidence, num_bins)[filled] / count[filled]
    found = torch.bincount(place, right, num_bins)[filled] / count[filled]
    share = count[filled] / len(logits)
    ece = float((share * (believed - found).abs()).sum())
    return Reliability(tuple(believed.tolist()), tuple(found.tolist()), tuple(share.tolist()), ece)


def memorized_layer(trace: ExitTrace) -> Tensor:
    """The first layer from which on every exit is right, `[N]`; the number of layers if the last exit is wrong.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882) calls it the Memorized Layer. A row that only the last exit gets
    right counts as hard as one that no exit gets right.
    """
    steady = right_exits(trace).flip(1).int().cumprod(1).sum(1)  # [N], exits that are right counted from the last
    layers = torch.tensor(trace.exit_layers, dtype=torch.float32)
    return layers[(trace.num_exits - steady).clamp_max(trace.num_exits - 1)]


def right_exits(trace: ExitTrace) -> Tensor:
    """Whether each exit answers each row rightly, `[N, E]`; with many labels, all of them."""
    if trace.problem_type == REGRESSION:
        raise DataError(
            "Values are never right or wrong, so memorized and oracle layers do not exist; use hardness 'loss' or 'none'.",
            field="hardness",
        )
    if trace.problem_type == MULTI_LABEL:
        return ((trace.logits > 0) == (trace.labels[:, None] > 0)).all(-1)
    return trace.logits.argmax(-1) == trace.labels[:, None]
