"""What an early answer can cost against the full model's, row by row: the losses that a promise is about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..problem_types import REGRESSION, predictions
from ..trace import ExitTrace
from ..values import check_choice
from .evidence import betting_p, binomial_p
from .quality import Metric
from .search import Array

HARM, DISAGREEMENT, DROP = "harm", "disagreement", "drop"
RISKS = (DROP, HARM, DISAGREEMENT)
SHARES = np.linspace(0.05, 0.95, 19)  # of the largest bet that a gambler survives


class Tally(NamedTuple):
    """Losses of n rows: different values, and how often each occurred."""

    values: Array
    counts: Array

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self.values @ self.counts)


@dataclass(frozen=True)
class Losses:
    """Losses of leaving at each exit `[N, E]`, 0 at the last, and the range that they lie in.

    Attributes:
        values: `[N, E]`.
        low, high: of any loss that could occur, -1 or 0 and 1.
    """

    values: Array
    low: float
    high: float

    @cached_property
    def are_whole(self) -> bool:
        """Whether every loss is -1, 0 or 1."""
        return bool(((self.values == 0) | (self.values == 1) | (self.values == -1)).all())

    def plan(self, seen: Tally, num_rows: int, limit: float) -> float | None:
        """How to test losses like these, so that the test has the best chance; by rows that are not tested.

        Args:
            seen: losses of other rows.
            num_rows: that will be tested.
            limit: of the mean loss.

        Returns:
            The share to bet; `None` for the binomial test of the rows with a loss, which overlooks gains.
        """
        if self.low == 0 and self.are_whole:
            return None
        seen = Tally(np.append(seen.values, self.high), np.append(seen.counts, 1.0))  # one more loss, against overconfidence
        losses, top, count = self._on_unit(seen.values), self._on_unit(limit), seen.counts.sum()
        growth = [np.log1p(share / (1 - top) * (top - losses)) @ seen.counts / count for share in SHARES]
        best = float(SHARES[int(np.argmax(growth))])
        if not self.are_whole:
            return best
        by_count = binomial_p(np.ceil(seen.counts[seen.values > 0].sum() / count * num_rows), num_rows, limit)
        return None if by_count < np.exp(-num_rows * max(growth)) else best

    def p_value(self, losses: Tally, limit: float, share: float | None) -> float:
        """p-value of "the mean loss is above `limit`", for the losses of n rows, by a plan made on others."""
        if not (count := int(losses.counts.sum())):
            return 1.0
        if share is None:  # the mean of the losses alone is no lower than with the gains
            return binomial_p(float(losses.counts[losses.values > 0].sum()), count, limit)
        return betting_p(self._on_unit(losses.values), losses.counts, float(self._on_unit(limit)), share)

    def p_value_at(self, rate: float, num_rows: int, limit: float) -> float:
        """The same for n rows of which a share has the highest loss and all others none, by the plan that suits them."""
        if self.are_whole:
            return binomial_p(np.ceil(rate * num_rows), num_rows, limit)
        values, counts = self._on_unit(np.array([0.0, self.high])), np.array([(1 - rate) * num_rows, rate * num_rows])
        return min(betting_p(values, counts, float(self._on_unit(limit)), share) for share in SHARES)

    def _on_unit(self, losses: Any) -> Any:
        return (losses - self.low) / (self.high - self.low)


def losses_of(risk: str, trace: ExitTrace, answers: Tensor, metric: Metric, bound: float | None) -> Losses:
    """Losses of every row at every exit.

    Args:
        risk: "harm": the full model is right and the early answer wrong; "disagreement": they differ, whatever is right;
            "drop": the full model's quality minus the early answer's, gains counted.
        trace: the rows.
        answers: of a policy at each exit `[N, E, C]`.
        metric: what quality means for "drop"; a mean over rows.
        bound: the largest difference in quality that counts, for values; bigger ones are cut to it. The losses are then in
            units of it.

    Raises:
        CalibrationError: for an unknown risk, or one that does not fit the rows.
    """
    check_choice(RISKS, error=CalibrationError, risk=risk)
    if risk == DISAGREEMENT:
        if trace.problem_type == REGRESSION:
            raise CalibrationError("Values hardly ever agree exactly; certify risk='drop' with a bound.", field="risk")
        chosen, full = (predictions(part, trace.problem_type) for part in (answers, trace.logits[:, -1:]))
        differs = chosen != full
        differs = differs if differs.ndim == 2 else differs.any(-1)
        return Losses(_last_is_free(differs.double().numpy()), 0.0, 1.0)
    if not metric.is_mean:
        raise CalibrationError(
            f"{metric.name} is no mean over rows, so no number of rows certifies it. Certify risk='harm' with by='label', "
            "which bounds what each class loses, or a metric such as accuracy.",
            field="metric",
            value=metric.name,
        )
    quality = metric.per_row(answers, trace.labels, trace.problem_type).numpy()
    full_quality = metric.per_row(trace.logits[:, -1], trace.labels, trace.problem_type).numpy()[:, None]
    if trace.problem_type == REGRESSION:
        if bound is None or not bound > 0:
            raise CalibrationError(
                f"bound is {bound!r}; certifying values needs the largest difference in {metric.title(REGRESSION)} that "
                "counts, above 0: bigger ones are cut to it.",
                field="bound",
            )
        quality, full_quality = quality / bound, full_quality / bound
    drop = (full_quality - quality).clip(-1, 1)
    if risk == HARM:
        return Losses(_last_is_free(drop.clip(min=0)), 0.0, 1.0)
    return Losses(_last_is_free(drop), -1.0, 1.0)


def _last_is_free(losses: Array) -> Array:
    """Whoever runs through all layers has the full model's answer."""
    losses[:, -1] = 0.0
    return losses


def groups_of(by: str | None, trace: ExitTrace, groups: NDArray[np.int64] | None) -> dict[str, NDArray[np.bool_]]:
    """The parts of the rows that must each keep the promise, by name; all rows by default.

    Args:
        by: `None`, "label", or "group" for `groups`.
        trace: the rows.
        groups: number of the slice that each row belongs to `[N]`.
    """
    if by is None:
        return {"all rows": np.ones(trace.num_rows, dtype=bool)}
    if by == "label" and trace.problem_type != REGRESSION and trace.labels.ndim == 1:
        member = trace.labels.numpy()
    elif by == "group" and groups is not None and groups.shape == (trace.num_rows,):
        member = groups
    else:
        raise CalibrationError(
            f"by is {by!r}; expected None, 'label' for rows of one label, or 'group' with one number a row in `groups`.",
            field="by",
            value=by,
        )
    return {f"{by} {value}": member == value for value in np.unique(member)}
