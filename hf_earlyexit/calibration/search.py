"""Every threshold at once: exact sweeps over the observed scores, without a loop over thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Curve(NamedTuple):
    """What a policy costs and is worth at each of K settings, the careful ones first.

    Attributes:
        thresholds: `[K, E - 1]`, nan where an exit is closed.
        cost: mean cost in layers, `[K]`.
        quality: mean quality of the answers given, `[K]`.
        standard_error: of the difference in quality to the full model, on the same rows, `[K]`.
    """

    thresholds: Array
    cost: Array
    quality: Array
    standard_error: Array


def sweep(scores: Array, values: Sequence[Array], thresholds: Array) -> list[Array]:
    """Mean over rows of what each row gets at the exit it takes, for every threshold at once.

    A row leaves at the first exit whose score reaches the threshold, hence at the first whose running maximum does; so
    each exit adds its difference to the next exit at one place of the sorted thresholds, and one cumulative sum does it.

    Args:
        scores: `[N, E]`; the last column is not read.
        values: matrices `[N, E]`: what a row gets for leaving at each exit.
        thresholds: `[K]`, ascending.

    Returns:
        One `[K]` for each of `values`.
    """
    reached = np.maximum.accumulate(scores[:, :-1], axis=1)
    passed = np.searchsorted(thresholds, reached, side="right").ravel()  # thresholds below this index are reached
    means = []
    for value in values:
        gain = np.diff(value, axis=1).ravel()
        total = value[:, 0].sum() + np.cumsum(np.bincount(passed, gain, minlength=len(thresholds) + 1))
        means.append(total[:-1] / len(scores))
    return means


def candidates(scores: Array, lowest: float, counts: bool) -> Array:
    """All thresholds that make a difference, ascending: one for each observed score.

    A threshold lies halfway to the next lower score, so that the rounding noise of another batch cannot flip the very
    row it was taken from; policies that count keep their whole numbers.

    Args:
        scores: any shape; values that are not finite are left out.
        lowest: the smallest threshold the policy allows.
        counts: whether scores are whole numbers.
    """
    seen = np.unique(scores[np.isfinite(scores)])
    cuts = seen if counts else np.concatenate([seen[:1], cut_between(seen[:-1], seen[1:])])
    allowed: Array = np.maximum(cuts[seen >= lowest], lowest)
    return allowed


def cut_between(lower: Array, upper: Array) -> Array:
    """Float32 numbers in `(lower, upper]`, halfway where there is room, element by element."""
    middle = np.float32((lower + upper) / 2).astype(np.float64)
    return np.where((lower < middle) & (middle <= upper), middle, upper)


def single_threshold_curve(scores: Array, quality: Array, cost: Array, lowest: float, counts: bool) -> Curve:
    """The curve of one threshold shared by all exits, from "nobody leaves early" to the lowest candidate.

    Args:
        scores: `[N, E]`; a column of -inf is an exit that stays closed.
        quality: `[N, E]`: quality of each exit's answer.
        cost: `[E]`: cost of leaving there.
        lowest, counts: see `candidates`.
    """
    cuts = candidates(scores[:, :-1], lowest, counts)
    gain = quality - quality[:, -1:]
    costs, gains, squares = sweep(scores, [np.broadcast_to(cost, scores.shape), gain, gain**2], cuts)
    open_exits = np.isfinite(scores[:, :-1]).any(0)
    vectors = np.where(open_exits, cuts[:, None], np.nan)
    closed = np.full((1, scores.shape[1] - 1), np.nan)
    return Curve(
        np.concatenate([closed, vectors[::-1]]),
        np.append(costs, cost[-1])[::-1],
        np.append(gains, 0.0)[::-1] + quality[:, -1].mean(),
        np.append(_standard_error(gains, squares, len(scores)), 0.0)[::-1],
    )


def _standard_error(means: Array, squares: Array, count: int) -> Array:
    return np.sqrt((squares - means**2).clip(0) / count)


class LeaverRule(NamedTuple):
    """When a set of rows may leave at an exit, by their errors there.

    Attributes:
        bound: `[E - 1]`: the largest error rate allowed to the leavers; `None` to compare with the last exit's errors on
            the same rows.
        slack: errors per row allowed on top.
        sigmas: standard errors of the difference that must be to spare.
        min_leavers: fewest rows that count as evidence.
    """

    bound: Array | None
    slack: float = 0.0
    sigmas: float = 0.0
    min_leavers: int = 1

    def holds(self, errors: Array, last_errors: Array, exit_index: int) -> NDArray[np.bool_]:
        """For each k: whether the first k rows may leave. `errors` `[n]` are in the order of leaving."""
        count = np.arange(1, len(errors) + 1)
        if self.bound is None:
            excess = errors - last_errors
            spare = self.sigmas * np.sqrt(np.cumsum(excess**2))
            fine = np.cumsum(excess) + spare <= self.slack * count + 1e-9
        else:
            rate = np.cumsum(errors) / count
            spare = self.sigmas * np.sqrt(rate * (1 - rate).clip(0) / count)
            fine = rate + spare < self.bound[exit_index] + self.slack
        return fine & (count >= self.min_leavers)


def per_exit_thresholds(scores: Array, errors: Array, rule: LeaverRule, lowest: float, counts: bool) -> Array:
    """One threshold per exit, in order: each exit takes as many of the rows that reached it as the rule allows.

    Args:
        scores: `[N, E]`.
        errors: `[N, E]`: error of each exit's answer, one minus its quality.
        rule: who may leave.
        lowest, counts: see `candidates`.

    Returns:
        `[E - 1]`, nan for exits that cannot satisfy the rule.
    """
    thresholds = np.full(scores.shape[1] - 1, np.nan)
    staying = np.arange(len(scores))
    for index in range(len(thresholds)):
        score = scores[staying, index]
        order = np.argsort(-score, kind="stable")
        ranked = np.append(score[order], -np.inf)
        fine = rule.holds(errors[staying, index][order], errors[staying, -1][order], index)
        fine &= (ranked[:-1] > ranked[1:]) & (ranked[:-1] >= lowest)  # equal scores leave together
        if not fine.any():
            continue
        last = int(np.flatnonzero(fine)[-1])
        below = ranked[last + 1]
        cut = ranked[last] if counts or not np.isfinite(below) else cut_between(below, ranked[last])
        thresholds[index] = max(float(cut), lowest)
        staying = staying[score < thresholds[index]]
    return thresholds


def per_exit_curve(
    scores: Array, quality: Array, cost: Array, rules: Sequence[LeaverRule], lowest: float, counts: bool
) -> Curve:
    """The curve of threshold vectors that a series of ever laxer rules gives.

    Args:
        scores, quality, cost, lowest, counts: see `single_threshold_curve`.
        rules: from strict to lax.
    """
    vectors = [np.full(scores.shape[1] - 1, np.nan)]
    vectors += [per_exit_thresholds(scores, 1 - quality, rule, lowest, counts) for rule in rules]
    exits = [exits_taken(scores, vector) for vector in vectors]
    rows = np.arange(len(scores))
    gains = np.stack([quality[rows, taken] - quality[:, -1] for taken in exits])  # [K, N]
    return Curve(
        np.stack(vectors),
        np.array([cost[taken].mean() for taken in exits]),
        gains.mean(1) + quality[:, -1].mean(),
        gains.std(1) / np.sqrt(len(scores)),
    )


def exits_taken(scores: Array, thresholds: Array) -> NDArray[np.int64]:
    """Exit index of each row `[N]`, for thresholds `[E - 1]` with nan for closed exits."""
    leave = np.ones(scores.shape, dtype=bool)
    leave[:, :-1] = scores[:, :-1] >= thresholds  # nan compares false
    return np.asarray(leave.argmax(1), dtype=np.int64)
