"""How far an exit's confidence can be believed, how many layers a row needs, and how rare classes fare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import DataError
from .problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, given_labels, predictions
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
    confidence, predicted = logits.double().softmax(-1).max(-1)
    right = (predicted == labels).double()
    place = (confidence * num_bins).long().clamp(max=num_bins - 1)
    count = torch.bincount(place, minlength=num_bins).double()
    filled = count > 0
    mean_confidence = torch.bincount(place, confidence, num_bins)[filled] / count[filled]
    accuracy = torch.bincount(place, right, num_bins)[filled] / count[filled]
    share = count[filled] / len(logits)
    ece = float((share * (mean_confidence - accuracy).abs()).sum())
    return Reliability(tuple(mean_confidence.tolist()), tuple(accuracy.tolist()), tuple(share.tolist()), ece)


def memorized_layer(trace: ExitTrace, ignored: Sequence[int] = ()) -> Tensor:
    """The first layer from which on every exit is right, `[N]`; the number of layers if the last exit is wrong.

    Args:
        trace: labelled rows.
        ignored: exits (0-based) that count for nothing, such as `trace.dead_exits()`: an exit that gives every row the same
            answer is right on the rows of that class, and knows nothing about any of them.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882) calls it the Memorized Layer. A row that only the last exit gets
    right counts as hard as one that no exit gets right.
    """
    kept = [index for index in range(trace.num_exits) if index not in ignored]
    return steady_layer(right_exits(trace)[:, kept], [trace.exit_layers[index] for index in kept])


def steady_layer(right: Tensor, exit_layers: Sequence[int]) -> Tensor:
    """The memorized layer `[N]` of rows or tokens, from whether each exit is right about them `[N, E]`."""
    steady = right.flip(1).int().cumprod(1).sum(1)  # [N], exits that are right counted from the last
    layers = torch.tensor(exit_layers, dtype=torch.float32)
    return layers[(len(layers) - steady).clamp_max(len(layers) - 1)]


def right_exits(trace: ExitTrace) -> Tensor:
    """Whether each exit answers each row rightly, `[N, E]`; with many labels, all of them."""
    if trace.problem_type == REGRESSION:
        raise DataError(
            "Values are never right or wrong, so memorized and oracle layers do not exist; use hardness 'loss' or 'none'.",
            field="hardness",
        )
    if trace.problem_type == MULTI_LABEL:
        agrees: Tensor = predictions(trace.logits, MULTI_LABEL) == given_labels(trace.labels[:, None])
        return agrees.all(-1)
    return trace.logits.argmax(-1) == trace.labels[:, None]


EVEN = 0.93  # entropy of the labels as a share of that of equal classes; with two, 65 to 35 is about there


def uneven_classes(labels: Tensor, problem_type: str, num_classes: int) -> bool:
    """Whether accuracy alone can hide what happens to rare classes: one label with uneven classes, or many labels.

    Args:
        labels: `[N]` class numbers, or `[N, C]` for many labels.
        problem_type: what they mean; values (regression) have no classes.
        num_classes: C; a class without a single row counts as rare.
    """
    if problem_type != SINGLE_LABEL:
        return problem_type == MULTI_LABEL
    share = torch.bincount(labels, minlength=num_classes).double() / max(len(labels), 1)
    entropy = -float(torch.xlogy(share, share).sum())
    return len(share) > 1 and entropy < EVEN * math.log(len(share))


def f1(logits: Tensor, labels: Tensor, problem_type: str) -> float:
    """F1 of answers, in `[0, 1]`: the mean over classes for one label ("macro"), over all decisions for many ("micro").

    A class that occurs neither among the labels nor among the answers is left out of the mean.

    Args:
        logits: `[N, C]`.
        labels: `[N]` class numbers, or `[N, C]`.
        problem_type: what they mean.

    Raises:
        DataError: for values (regression), which have no F1.
    """
    if problem_type == REGRESSION:
        raise DataError("Values are never right or wrong, so they have no F1.", field="problem_type", value=problem_type)
    answers = predictions(logits, problem_type)
    if problem_type == MULTI_LABEL:
        truth = given_labels(labels)
        both, either = (answers & truth).sum(), answers.sum() + truth.sum()
        return float(2 * both / either) if either else 0.0
    classes = logits.shape[-1]
    both = torch.bincount(labels[answers == labels], minlength=classes)
    either = torch.bincount(labels, minlength=classes) + torch.bincount(answers, minlength=classes)
    occurs = either > 0
    return float((2 * both[occurs] / either[occurs]).mean())


def f1_name(problem_type: str) -> str:
    """What `f1` is called where people read it."""
    return "micro F1" if problem_type == MULTI_LABEL else "macro F1"
