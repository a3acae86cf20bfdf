"""The metrics that calibration knows by name."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, predictions
from ..values import is_real
from .parts import Places, left_with, some
from .quality import METRICS, Comparison, Metric, RowMean, RowQuality


@METRICS.register("accuracy")
@dataclass(frozen=True)
class Accuracy(RowQuality):
    """Share of right answers; with many labels, the share of right labels."""

    problem_types = frozenset({SINGLE_LABEL, MULTI_LABEL})


@METRICS.register("mse")
@dataclass(frozen=True)
class SquaredError(RowQuality):
    """Minus the mean squared error."""

    problem_types = frozenset({REGRESSION})


@METRICS.register("mae")
@dataclass(frozen=True)
class AbsoluteError(RowMean):
    """Minus the mean absolute error."""

    problem_types = frozenset({REGRESSION})

    def per_row(self, logits: Tensor, labels: Tensor, problem_type: str) -> Tensor:
        truth = labels.reshape(labels.shape[0], *([1] * (logits.ndim - 2)), logits.shape[-1])
        return -(logits.double() - truth.double()).abs().mean(-1)

    def title(self, problem_type: str) -> str:
        return "minus absolute error"


class OfConfusion(Metric):
    """A metric of the confusion matrix; standard errors come from its derivatives (the influence of each row)."""

    @abstractmethod
    def of(self, confusion: Tensor) -> Tensor:
        """The metric, a scalar, of counts `[C, C]` by label and answer; the same for any multiple of the counts."""

    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        return float(self.of(_confusion(predictions(logits, problem_type), labels, logits.shape[-1])))

    def compare(self, early: Tensor, full: Tensor, labels: Tensor, problem_type: str) -> Comparison:
        judged = [self._judged(predictions(part, problem_type), labels, part.shape[-1]) for part in (early, full)]
        return _compared(*judged)

    def at_exits(
        self, answers: Tensor, full: Tensor, labels: Tensor, problem_type: str, places: Places = None
    ) -> Callable[[Tensor], Comparison]:
        exits, classes = range(answers.shape[1]), answers.shape[-1]
        predicted = torch.stack([predictions(some(answers[:, index], places), problem_type) for index in exits], 1)
        judged = self._judged(predictions(full, problem_type), labels, classes)
        return lambda exits: _compared(self._judged(left_with(predicted, None, exits), labels, classes), judged)

    def _judged(self, predicted: Tensor, labels: Tensor, num_classes: int) -> tuple[float, Tensor]:
        """The metric of these predictions `[n]`, and each row's influence on it `[n]`."""
        with torch.inference_mode(False), torch.enable_grad():
            confusion = _confusion(predicted, labels, num_classes).clone().requires_grad_()
            value = self.of(confusion)
            (slope,) = torch.autograd.grad(value, confusion)
        return value.item(), slope[labels, predicted] * len(labels)


def _compared(early: tuple[float, Tensor], full: tuple[float, Tensor]) -> Comparison:
    spread = (early[1] - full[1]).std(correction=0) / math.sqrt(len(full[1]))
    return Comparison(early[0], full[0], float(spread))


def _confusion(answers: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    cells = torch.bincount(labels * num_classes + answers, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes).double()


def _f1(confusion: Tensor) -> Tensor:
    """F1 of each class `[C]`; 0 for a class that neither occurs nor is answered."""
    return 2 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1)).clamp_min(1e-12)


@METRICS.register("f1")
@dataclass(frozen=True)
class F1(OfConfusion):
    """F1 of one class.

    Args:
        label: the class, from 0; class 1 by default, as with yes and no.
    """

    label: int = 1

    def __post_init__(self) -> None:
        if self.label != int(self.label) or self.label < 0:
            raise CalibrationError(f"label is {self.label!r}; expected a class number from 0.", field="metric")
        object.__setattr__(self, "label", int(self.label))

    def of(self, confusion: Tensor) -> Tensor:
        if self.label >= len(confusion):
            raise CalibrationError(
                f"There is no class {self.label}; the labels are 0 to {len(confusion) - 1}.", field="metric"
            )
        return _f1(confusion)[self.label]

    def title(self, problem_type: str) -> str:
        return f"F1 of class {self.label}"


@METRICS.register("f1-macro")
@dataclass(frozen=True)
class MacroF1(OfConfusion):
    """Mean F1 of the classes that occur among the labels."""

    def of(self, confusion: Tensor) -> Tensor:
        return _f1(confusion)[confusion.sum(1) > 0].mean()

    def title(self, problem_type: str) -> str:
        return "macro F1"


@METRICS.register("balanced-accuracy")
@dataclass(frozen=True)
class BalancedAccuracy(OfConfusion):
    """Mean recall of the classes that occur among the labels."""

    def of(self, confusion: Tensor) -> Tensor:
        rows = confusion.sum(1)
        return (confusion.diagonal() / rows.clamp_min(1e-12))[rows > 0].mean()

    def title(self, problem_type: str) -> str:
        return "balanced accuracy"


@METRICS.register("matthews")
@dataclass(frozen=True)
class Matthews(OfConfusion):
    """Matthews' correlation of answers and labels, also for more than two classes; 0 where either is constant."""

    def of(self, confusion: Tensor) -> Tensor:
        total, given, answered = confusion.sum(), confusion.sum(1), confusion.sum(0)
        spread = (total**2 - (given**2).sum()) * (total**2 - (answered**2).sum())
        covariance = confusion.diagonal().sum() * total - (given * answered).sum()
        return covariance / spread.clamp_min(1e-12 * total.detach() ** 4).sqrt()

    def title(self, problem_type: str) -> str:
        return "Matthews correlation"


@METRICS.register("recall-at-precision")
@dataclass(frozen=True)
class RecallAtPrecision(Metric):
    """The largest share of the rows of class 1 that can be caught at a precision, over cuts of the class's probability.

    Args:
        precision: in `(0, 1]`.
    """

    precision: float = 0.9

    def __post_init__(self) -> None:
        if not is_real(self.precision, 0, 1) or self.precision == 0:
            raise CalibrationError(f"precision is {self.precision!r}; expected a share in (0, 1].", field="metric")

    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        return float(self.values_on(torch.ones(1, len(labels), dtype=torch.bool), logits, labels, problem_type)[0])

    def values_on(self, parts: Tensor, logits: Tensor, labels: Tensor, problem_type: str) -> NDArray[np.float64]:
        if logits.shape[-1] != 2:
            raise CalibrationError(f"recall-at-precision is for 2 classes; there are {logits.shape[-1]}.", field="metric")
        score, order = (logits[:, 1].double() - logits[:, 0].double()).sort(descending=True, stable=True)
        taken = parts[:, order]
        caught = (taken & (labels[order] == 1)).cumsum(1).double()
        precision = caught / taken.cumsum(1).clamp_min(1)
        is_cut = torch.cat([score[:-1] > score[1:], torch.ones(1, dtype=torch.bool)])  # equal scores stand together
        reached = caught.masked_fill(~is_cut | (precision < self.precision), 0).amax(1)
        recall: NDArray[np.float64] = (reached / caught[:, -1].clamp_min(1)).numpy()
        return recall

    def title(self, problem_type: str) -> str:
        return f"recall at precision {self.precision:g}"


@METRICS.register("spearman")
@dataclass(frozen=True)
class Spearman(Metric):
    """Spearman's rank correlation of one predicted value and its label; 0 where either is constant."""

    problem_types = frozenset({REGRESSION})

    def value(self, logits: Tensor, labels: Tensor, problem_type: str) -> float:
        if logits.shape[-1] != 1:
            raise CalibrationError(f"spearman is for one value a row; there are {logits.shape[-1]}.", field="metric")
        ranks = [_ranks(part.double().flatten()) for part in (logits, labels)]
        first, second = (part - part.mean() for part in ranks)
        length = first.norm() * second.norm()
        return float(first @ second / length) if length > 0 else 0.0

    def title(self, problem_type: str) -> str:
        return "Spearman correlation"


def _ranks(values: Tensor) -> Tensor:
    """Mean ranks `[N]`; equal values share theirs."""
    _, place, count = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (count.cumsum(0).double() - (count - 1) / 2)[place]
    return ranks
