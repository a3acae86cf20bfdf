"""What evaluations log for every exit."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, given_labels, predictions
from ..registry import Registry

EXIT_METRICS: Registry[Callable[[np.ndarray, np.ndarray], float]] = Registry("exit metric")


def default_exit_metric(problem_type: str) -> str:
    """The metric a problem type is usually judged by."""
    return {REGRESSION: "spearman", MULTI_LABEL: "f1"}.get(problem_type, "accuracy")


def exit_metrics(exit_logits: np.ndarray, labels: np.ndarray, exit_layers: list[int], metric: str) -> dict[str, float]:
    """One number per exit, keyed `exit_<layer>_<metric>`.

    Args:
        exit_logits: `[N, E, C]`.
        labels: `[N]` or `[N, C]`; rows labelled -100 are left out.
        exit_layers: layer of each exit.
        metric: a name of `EXIT_METRICS`.
    """
    counted = labels != -100 if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) else slice(None)
    compute = EXIT_METRICS.get(metric)
    return {
        f"exit_{layer}_{metric}": compute(exit_logits[counted, index], labels[counted])
        for index, layer in enumerate(exit_layers)
    }


def _classes(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers, and labels as these are: class numbers `[N]`, or which of many labels are given `[N, C]`."""
    problem_type = MULTI_LABEL if labels.ndim == 2 else SINGLE_LABEL
    answers = predictions(torch.from_numpy(logits), problem_type).numpy()
    return answers, given_labels(labels) if labels.ndim == 2 else labels


@EXIT_METRICS.register("accuracy")
def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers; with many labels, of right labels."""
    answers, truth = _classes(logits, labels)
    return float((answers == truth).mean())


@EXIT_METRICS.register("f1")
def glue_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 for two classes, micro-averaged for many labels, macro-averaged otherwise."""
    from sklearn.metrics import f1_score

    average = "micro" if labels.ndim == 2 else "binary" if logits.shape[-1] == 2 else "macro"
    answers, truth = _classes(logits, labels)
    return float(f1_score(truth, answers, average=average, zero_division=0))


@EXIT_METRICS.register("matthews")
def matthews(logits: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of classes."""
    from sklearn.metrics import matthews_corrcoef

    answers, truth = _classes(logits, labels)
    return float(matthews_corrcoef(truth, answers))


@EXIT_METRICS.register("spearman")
def spearman(logits: np.ndarray, labels: np.ndarray) -> float:
    """Rank correlation of values; 0 where the exit or the labels say the same of every row."""
    from scipy.stats import spearmanr

    values = logits.reshape(len(labels), -1)[:, 0]
    return 0.0 if np.ptp(values) == 0 or np.ptp(labels) == 0 else float(spearmanr(values, labels.reshape(-1)).statistic)


@EXIT_METRICS.register("mse")
def mse(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error."""
    return float(np.square(logits.reshape(labels.shape) - labels).mean())


def on_last_exit(compute: Any) -> Any:
    """A `compute_metrics` that gets the last exit's logits alone, as everywhere else."""

    @wraps(compute)  # Trainer looks at the signature
    def wrapped(prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        plain = EvalPrediction(
            by_output(prediction.predictions)[0], prediction.label_ids, prediction.inputs, prediction.losses
        )
        metrics: dict[str, Any] = compute(plain, **kwargs)
        return metrics

    return wrapped


def keeping_exits(preprocess: Any) -> Any:
    """A `preprocess_logits_for_metrics` that changes the last exit's logits and leaves those of all exits as they are."""

    def wrapped(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[Any, ...]:
        return preprocess(outputs[0], labels), *outputs[1:]

    return wrapped


def by_output(predictions: Any) -> Any:
    """Predictions by kind of output, each a list of batches where the Trainer does not join them."""
    return [list(part) for part in zip(*predictions, strict=True)] if isinstance(predictions, list) else predictions


def one_array(part: Any) -> np.ndarray:
    """One array of an output that may be kept batch by batch."""
    return np.concatenate(part) if isinstance(part, list) else np.asarray(part)
