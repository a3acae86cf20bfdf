"""What answers are worth over a set of rows: the metric that targets, calibration, evaluation and cards speak in.

Bigger is better, so errors count as their negatives. A metric that is a mean over rows is swept exactly over every
threshold; any other is computed anew at candidate settings.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..metrics import uneven_classes
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, predictions, quality_name, row_quality
from ..registry import Registry
from ..trace import ExitTrace
from .parts import Places, left_with, some

METRICS: Registry[type[Metric]] = Registry("metric")
GROUPS = 20  # of the jackknife


class Comparison(NamedTuple):
    """Early answers beside the full model's on the same rows: both values, and the standard error of their difference."""

    quality: float
    full_quality: float
    standard_error: float


@dataclass(frozen=True)
class Metric(ABC):
    """A way to judge answers.

    Subclass it, fill `value`, and register it by name with `@METRICS.register(name)`; it then works in `calibrate`, `replay`
    and on the command line.
    """

    problem_types: ClassVar[frozenset[str]] = frozenset({SINGLE_LABEL})
    is_mean: ClassVar[bool] = False  # True: the metric is the mean of `per_row`

    @abstractmethod
    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        """The metric over all rows.

        Args:
            logits: the answers `[N, C]`.
            labels: `[N]` class numbers, or `[N, C]` / `[N]` values.
            problem_type: one of the `problem_types`.
        """

    def per_row(self, logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
        """What each answer is worth, float64, `[N]` or `[N, E]` for logits `[N, C]` or `[N, E, C]`.

        Where the metric is no mean over rows, this stands in for it while settings are put forward: right or wrong, with
        rows of rare classes weighing as much in sum as those of frequent ones.
        """
        quality = row_quality(logits, labels, problem_type)
        if problem_type != SINGLE_LABEL:
            return quality
        counts = torch.bincount(labels, minlength=logits.shape[-1]).double()
        weight = len(labels) / (counts.count_nonzero() * counts.clamp_min(1))
        weight = weight[labels]
        return quality * (weight if quality.ndim == 1 else weight[:, None])

    def values_on(self, parts: Tensor, logits: Tensor, labels: Tensor, problem_type: str) -> NDArray[np.float64]:
        """The metric over some parts of the rows `[P]`, which are booleans `[P, N]`; the others as for `value`."""
        return np.array([self.value(logits[rows], labels[rows], problem_type) for rows in parts])

    def compare(self, early: Tensor, full: Tensor, labels: Tensor, problem_type: str) -> Comparison:
        """Judge early answers and the full model's `[N, C]` on the same rows; the error is a jackknife over groups."""
        quality, full_quality = (self.value(part, labels, problem_type) for part in (early, full))
        count = min(GROUPS, len(labels))
        if count < 2 or torch.equal(early, full):
            return Comparison(quality, full_quality, 0.0)
        group = torch.arange(len(labels)) * count // len(labels)
        group = group[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
        kept = group != torch.arange(count)[:, None]
        early_values, full_values = (self.values_on(kept, part, labels, problem_type) for part in (early, full))
        spread = np.var(early_values - full_values) * (count - 1)
        return Comparison(quality, full_quality, float(math.sqrt(spread)))

    def at_exits(
        self, answers: Tensor, full: Tensor, labels: Tensor, problem_type: str, places: Places = None
    ) -> Callable[[Tensor], Comparison]:
        """`compare` of the answers that rows leave with, for many settings on the same rows.

        Args:
            answers: of all rows at every exit `[N, E, C]`.
            full: the full model's of these rows `[n, C]`; labels: theirs.
            problem_type: what they mean.
            places: of the rows `[n]`; `None` for all.

        Returns:
            A function of the exits that the rows take `[n]`.
        """
        return lambda exits: self.compare(left_with(answers, places, exits), full, labels, problem_type)

    @property
    def is_row_quality(self) -> bool:
        """Whether it is the mean of `row_quality`, which need not be worked out again where it is known."""
        mine = type(self)
        return mine.per_row is RowQuality.per_row and mine.compare is RowMean.compare

    @property
    def name(self) -> str:
        """The words that give this metric: its name, and its numbers behind colons."""
        numbers = [getattr(self, field.name) for field in dataclasses.fields(self)]
        name = next(name for name in METRICS.names() if METRICS.get(name) is type(self))
        return ":".join([name, *(f"{number:g}" for number in numbers)])

    def title(self, problem_type: str) -> str:
        """What the metric is called where people read it."""
        return self.name


def worth(metric: Metric, answers: Tensor, labels: Tensor, problem_type: str, places: Places) -> Tensor:
    """`per_row` of some rows at every exit `[n, E]`, exit by exit, so that not all their answers are copied.

    Args:
        metric: says what an answer is worth.
        answers, labels: of all rows, `[N, E, C]` and `[N]` or `[N, C]`.
        problem_type: what they mean.
        places: of the rows `[n]`; `None` for all.
    """
    labels, exits = some(labels, places), range(answers.shape[1])
    return torch.stack([metric.per_row(some(answers[:, index], places), labels, problem_type) for index in exits], 1)


def compare_rows(values: Tensor, full_values: Tensor) -> Comparison:
    """Compare what early answers and the full model's are worth, row by row `[N]`, by their means."""
    spread = (values - full_values).std(correction=0) / math.sqrt(len(values))
    return Comparison(float(values.mean()), float(full_values.mean()), float(spread))


class RowMean(Metric):
    """A metric that is the mean of what each row's answer is worth."""

    is_mean = True

    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        return float(self.per_row(logits, labels, problem_type).mean())

    def compare(self, early: Tensor, full: Tensor, labels: Tensor, problem_type: str) -> Comparison:
        return compare_rows(*(self.per_row(part, labels, problem_type) for part in (early, full)))


class RowQuality(RowMean):
    """The mean of `problem_types.row_quality`."""

    def per_row(self, logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
        return row_quality(logits, labels, problem_type)

    def title(self, problem_type: str) -> str:
        return quality_name(problem_type)


@dataclass(frozen=True)
class Custom(Metric):
    """A function of one's own.

    Args:
        function: of answers and labels, NumPy arrays: class numbers `[N]`, booleans `[N, C]` for many labels, or values
            `[N, C]`. Bigger must be better.
    """

    function: Callable[[Any, Any], float]

    problem_types = frozenset({SINGLE_LABEL, MULTI_LABEL, REGRESSION})

    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        given = self.function(predictions(logits, problem_type).numpy(), labels.numpy())
        try:
            number = float(given)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise CalibrationError(f"The metric {self.name} gave {given!r}; expected a finite number.", field="metric")
        return number

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def default_metric(trace: ExitTrace) -> str:
    """Accuracy; macro F1 where one label's classes are uneven; minus the squared error for values."""
    if trace.problem_type == REGRESSION:
        return "mse"
    if not trace.labelled:
        return "accuracy"
    uneven = trace.problem_type == SINGLE_LABEL and uneven_classes(trace.labels, SINGLE_LABEL, trace.logits.shape[-1])
    return "f1-macro" if uneven else "accuracy"


def find_metric(
    metric: str | Metric | Callable[[Any, Any], float] | None, problem_type: str, default: str = "accuracy"
) -> Metric:
    """The metric that is meant.

    Args:
        metric: a registered name, with numbers behind colons ("f1:2", "recall-at-precision:0.95"); a metric; a function of
            answers and labels; or `None` for the default.
        problem_type: what the labels mean.
        default: name of a metric; on values, "accuracy" stands for minus the squared error.

    Raises:
        UnknownNameError: for an unknown name.
        CalibrationError: for numbers out of range, or a metric that does not fit the problem type.
    """
    if metric is None:
        metric = "mse" if problem_type == REGRESSION and default == "accuracy" else default
    if isinstance(metric, str):
        name, *words = metric.split(":")
        cls = METRICS.get(name)
        try:
            metric = cls(*map(float, words))
        except CalibrationError:
            raise
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"Metric {metric!r} cannot be read: {error}.", field="metric", value=metric) from error
    elif not isinstance(metric, Metric):
        if not callable(metric):
            raise CalibrationError(
                f"metric is {metric!r}; expected one of {', '.join(METRICS.names())}, or a function of answers and labels.",
                field="metric",
            )
        metric = Custom(metric)
    if problem_type not in metric.problem_types:
        able = [name for name in METRICS.names() if problem_type in METRICS.get(name).problem_types]
        raise CalibrationError(
            f"{metric.name} is not for {problem_type}; these are: {', '.join(able)}.", field="metric", value=metric.name
        )
    return metric
