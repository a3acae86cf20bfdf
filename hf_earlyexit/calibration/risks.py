"""What an early answer can cost against the full model's, row by row: the losses that a promise is about."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..problem_types import REGRESSION, predictions
from ..trace import ExitTrace
from ..values import check_choice
from .evidence import betting_p, binomial_p, hoeffding_bentkus_p
from .paired import SMALL, best_credit, paired_p
from .quality import Metric
from .search import Array
from .slices import Parts, parts_by

HARM, DISAGREEMENT, DROP = "harm", "disagreement", "drop"
RISKS = (DROP, HARM, DISAGREEMENT)
COUNT, PAIRS, BET, HOEFFDING_BENTKUS = "binomial", "exact paired", "betting", "Hoeffding-Bentkus"
SHARES = np.linspace(0.05, 0.95, 19)  # of the largest bet that a gambler survives


class Tally(NamedTuple):
    """Losses of n rows: different values, and how often each occurred."""

    values: Array
    counts: Array

    @property
    def total(self) -> float:
        """Their sum."""
        return float(self.values @ self.counts)

    @property
    def total_lost(self) -> float:
        """The sum of those above 0."""
        return float(self.values.clip(min=0) @ self.counts)

    @property
    def num_lost(self) -> float:
        """Rows with a loss above 0."""
        return float(self.counts[self.values > 0].sum())

    @property
    def num_gained(self) -> float:
        """Rows that gain as much as a whole loss takes."""
        return float(self.counts[self.values <= -1].sum())


class Plan(NamedTuple):
    """Which test, and its number: tenths of a loss credited for a gain, or the share of the largest stake that is bet."""

    test: str
    number: float = 0.0


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

    def plan(self, seen: Tally, num_rows: int, limit: float, level: float) -> Plan:
        """How to test other losses like these, so that the test has the best chance. Those tested have no say in it.

        Args:
            seen: of these, those at one setting.
            num_rows: that will be tested.
            limit: of the mean loss.
            level: what the p-value will be held against.
        """
        if self.are_whole:
            return Plan(COUNT) if self.low == 0 else self._plan_of_pairs(seen, num_rows, limit, level)
        seen = Tally(np.append(seen.values, self.high), np.append(seen.counts, 1.0))  # one more loss, against overconfidence
        expected = _at_edge(seen, num_rows, limit)
        losses, top = self._on_unit(expected.values), self._on_unit(limit)
        growth = [np.log1p(bet / (1 - top) * (top - losses)) @ expected.counts for bet in SHARES]
        p_values = {
            Plan(BET, float(SHARES[int(np.argmax(growth))])): np.exp(-max(growth)),
            Plan(HOEFFDING_BENTKUS): hoeffding_bentkus_p(expected.total_lost, num_rows, limit),
            Plan(COUNT): binomial_p(np.ceil(expected.num_lost - 1e-9), num_rows, limit),
        }
        return min(p_values, key=p_values.__getitem__)

    @staticmethod
    def _plan_of_pairs(seen: Tally, num_rows: int, limit: float, level: float) -> Plan:
        """How much of a gain to credit, for rows with as many gains and no more losses than might be certified."""
        rows = seen.counts.sum() + 1
        gains = (seen.num_gained + 0.5) / rows
        losses = min((seen.num_lost + 0.5) / rows, gains + edge(num_rows, limit))
        credit = best_credit(losses * num_rows, gains * num_rows, num_rows, limit, level)
        return Plan(PAIRS, credit) if credit else Plan(COUNT)

    def p_value(self, losses: Tally, limit: float, plan: Plan, levels: tuple[float, float] = (SMALL, 1.0)) -> float:
        """p-value of "the mean loss is above `limit`", for the losses of n rows, by a plan made on others.

        Args:
            losses, limit, plan: as said.
            levels: the lowest and the highest that it will be held against; see `paired_p`.
        """
        if not (count := round(losses.counts.sum())):
            return 1.0
        if plan.test == PAIRS:  # losses between are taken for whole ones, and gains between for none
            return paired_p(round(losses.num_lost), round(losses.num_gained), count, limit, int(plan.number), levels)
        if plan.test == BET:
            return betting_p(self._on_unit(losses.values), losses.counts, float(self._on_unit(limit)), plan.number)
        if plan.test == HOEFFDING_BENTKUS:  # the mean of the losses alone is no lower than with the gains
            return hoeffding_bentkus_p(losses.total_lost, count, limit)
        return binomial_p(losses.num_lost, count, limit)  # nor is it where every loss is taken for a whole one

    def p_value_at(self, rate: float, num_rows: int, limit: float) -> float:
        """The same for n rows of which a share has the highest loss and all others none, by the plan that suits them."""
        if self.are_whole:
            return binomial_p(np.ceil(rate * num_rows), num_rows, limit)
        values, counts = self._on_unit(np.array([0.0, self.high])), np.array([(1 - rate) * num_rows, rate * num_rows])
        bets = [betting_p(values, counts, float(self._on_unit(limit)), share) for share in SHARES]
        return min(*bets, hoeffding_bentkus_p(rate * num_rows, num_rows, limit))

    def _on_unit(self, losses: Any) -> Any:
        return (losses - self.low) / (self.high - self.low)


def edge(num_rows: int, limit: float) -> float:
    """About the highest mean loss that n rows might certify: two standard errors below the limit, or half of it."""
    return max(limit / 2, limit - 2 * math.sqrt(limit / num_rows))


def _at_edge(seen: Tally, num_rows: int, limit: float) -> Tally:
    """What n rows would lose that are like those seen, but for being spared losses with which none could be certified."""
    shares, lost = seen.counts / seen.counts.sum(), seen.values > 0
    excess = seen.values @ shares - edge(num_rows, limit)
    spared = np.where(lost, shares * max(0.0, excess) / max(float(seen.values[lost] @ shares[lost]), 1e-300), 0.0)
    return Tally(np.append(seen.values, 0.0), num_rows * np.append(shares - spared, spared.sum()))


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
        full, differs = predictions(trace.logits[:, -1], trace.problem_type), []
        for here in answers.unbind(1):  # what they say of many labels takes room
            other = predictions(here, trace.problem_type) != full
            differs.append(other if other.ndim == 1 else other.any(-1))
        return Losses(_last_is_free(torch.stack(differs, 1).double().numpy()), 0.0, 1.0)
    if not metric.is_mean:
        raise CalibrationError(
            f"{metric.name} is no mean over rows, so no number of rows certifies it. Certify risk='harm' with by='label', "
            "which bounds what each class loses, or a metric such as accuracy.",
            field="metric",
            value=metric.name,
        )
    if bound is not None and trace.problem_type != REGRESSION:
        raise CalibrationError(
            f"bound is {bound:g}; rows of labels lose no more than 1 each; leave it out: it is for values, lists and texts.",
            field="bound",
            value=bound,
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


def groups_of(by: str | None, labels: Tensor, problem_type: str, groups: NDArray[Any] | None) -> Parts:
    """The parts of the rows that must each keep the promise, by name; all rows by default.

    Args:
        by: `None`, "label", or "group" for `groups`.
        labels: of the rows, `[N]` or `[N, C]`.
        problem_type: what they mean.
        groups: number or name of each row's slice `[N]`.
    """
    if by is None:
        return {"all rows": np.ones(len(labels), dtype=bool)}
    if by == "label" and problem_type != REGRESSION and labels.ndim == 1:
        member = labels.numpy()
    elif by == "group" and groups is not None and groups.shape == (len(labels),):
        member = groups
    else:
        raise CalibrationError(
            f"by is {by!r}; expected None, 'label' for rows of one label, or 'group' with one number a row in `groups`.",
            field="by",
            value=by,
        )
    return parts_by(by, member)
