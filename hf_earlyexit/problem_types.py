"""Problem types and what a prediction means in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = (SINGLE_LABEL, MULTI_LABEL, REGRESSION)


def predictions(logits: Tensor, problem_type: str) -> Tensor:
    """What a row of outputs says.

    Args:
        logits: `[..., C]`.
        problem_type: one of `PROBLEM_TYPES`.

    Returns:
        `[...]` class numbers for one label; `[..., C]` booleans for many labels; the values themselves for regression.
    """
    if problem_type == SINGLE_LABEL:
        return largest(logits)
    if problem_type == MULTI_LABEL:
        return logits > 0
    return logits


def given_labels(labels: Any) -> Any:
    """Which of many labels count as given: those from 0.5 on, as booleans.

    Args:
        labels: `[..., C]`, from 0 to 1; a tensor or an array.
    """
    return labels >= 0.5


def same_prediction(first: Tensor, second: Tensor, problem_type: str, tolerance: float = 0.0) -> Tensor:
    """Whether two exits say the same of each row.

    Args:
        first, second: logits `[B, C]`.
        problem_type: one of `PROBLEM_TYPES`.
        tolerance: for regression, the largest difference that still counts as the same.

    Returns:
        `[B]` booleans.
    """
    return agreeing(predictions(first, problem_type), predictions(second, problem_type), problem_type, tolerance)


def agreeing(first: Tensor, second: Tensor, problem_type: str, tolerance: float = 0.0) -> Tensor:
    """`same_prediction`, of `predictions`."""
    if problem_type == REGRESSION:
        return (first - second).abs().amax(-1) <= tolerance
    same = first == second
    return same if problem_type == SINGLE_LABEL else same.all(-1)  # over labels, never over rows


def row_quality(logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
    """How good each answer is: 1 or 0 for one label, share of right labels for many, minus squared error for regression.

    Args:
        logits: `[N, C]` or `[N, E, C]`.
        labels: `[N]` class numbers, or `[N, C]` / `[N]` values; of many labels, see `given_labels`.
        problem_type: one of `PROBLEM_TYPES`.

    Returns:
        float64, `[N]` or `[N, E]`.
    """
    if problem_type == SINGLE_LABEL:
        right = largest(logits) == (labels if logits.ndim == 2 else labels[:, None])
        return right.double()
    truth = labels.reshape(labels.shape[0], *([1] * (logits.ndim - 2)), logits.shape[-1])
    if problem_type == MULTI_LABEL:
        agrees: Tensor = predictions(logits, problem_type) == given_labels(truth)
        return agrees.double().mean(-1)
    return -(logits.double() - truth.double()).square().mean(-1)


def largest(logits: Tensor) -> Tensor:
    """`argmax` over classes, the first of equals; of many rows NumPy finds it in a third to a sixth of the time.

    Of logits that do not lie side by side, such as those of one exit, it would make a copy; what is traced for a graph, or
    compiled, has no numbers yet.
    """
    plain = type(logits) is Tensor and not torch.compiler.is_compiling() and logits.dtype != torch.bfloat16
    if not plain or logits.device.type != "cpu" or not logits.is_contiguous():
        return logits.argmax(-1)
    return torch.as_tensor(logits.detach().numpy().argmax(-1))


def majority_quality(labels: Tensor, problem_type: str) -> float:
    """The best mean `row_quality` that a constant answer reaches on these labels."""
    if problem_type == SINGLE_LABEL:
        return float(torch.bincount(labels).max()) / labels.shape[0]
    values = labels.double().reshape(labels.shape[0], -1)
    if problem_type == MULTI_LABEL:
        share = given_labels(values).double().mean(0)
        return float(torch.maximum(share, 1 - share).mean())
    return -float(values.var(0, correction=0).mean())


def quality_name(problem_type: str) -> str:
    """What `row_quality` is called where people read it."""
    names = {SINGLE_LABEL: "accuracy", MULTI_LABEL: "share of right labels", REGRESSION: "minus squared error"}
    return names[problem_type]
