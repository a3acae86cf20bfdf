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


def means_along(path: Array, scores: Array, values: Sequence[Array]) -> list[Array]:
    """Mean over rows of what each row gets at the exit it takes, at every setting of a path.

    Args:
        path: settings `[K, E - 1]`, nan where an exit is closed.
        scores: `[N, E]`.
        values: matrices `[N, E]`.

    Returns:
        One `[K]` for each of `values`.
    """
    shared = shared_thresholds(path)
    if shared is not None:
        open_exits, cuts = shared
        order = np.argsort(cuts, kind="stable")
        seen = np.where(open_exits, scores[:, :-1], -np.inf)
        swept = sweep(np.column_stack([seen, scores[:, -1]]), values, cuts[order])
        back = np.argsort(order, kind="stable")
        return [mean[back] for mean in swept]
    rows, columns = np.arange(len(scores)), np.asfortranarray(scores)
    means = np.empty((len(values), len(path)))
    for place, setting in enumerate(path):
        taken = exits_taken(columns, setting)
        means[:, place] = [value[rows, taken].mean() for value in values]
    return list(means)


def shared_thresholds(path: Array) -> tuple[NDArray[np.bool_], Array] | None:
    """The open exits `[E - 1]` and the one threshold of each setting `[K]`, infinite where all are closed.

    `None` where settings differ in more than that.
    """
    opened = np.isfinite(path)
    open_exits: NDArray[np.bool_] = np.logical_or.reduce(opened, axis=0)
    lowest: Array = np.where(opened, path, np.inf).min(1)
    highest: Array = np.where(opened, path, -np.inf).max(1)
    some = opened.any(1)
    alike = bool((opened[some] == open_exits).all() and (lowest == highest)[some].all())
    return (open_exits, lowest) if alike else None


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
    open_exits = np.asarray(np.isfinite(scores[:, :-1]).any(0), dtype=np.bool_)
    vectors = np.full((len(cuts) + 1, len(open_exits)), np.nan)
    vectors[1:, open_exits] = cuts[::-1, None]
    return Curve(
        vectors,
        np.append(costs, cost[-1])[::-1],
        np.append(gains, 0.0)[::-1] + quality[:, -1].mean(),
        np.append(standard_error(gains, squares, len(scores)), 0.0)[::-1],
    )


def standard_error(means: Array, squares: Array, count: int) -> Array:
    """Of a mean over `count` rows, from means of the values and of their squares."""
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

    def holds(self, errors: Array, exit_index: int) -> NDArray[np.bool_]:
        """For each k: whether the first k rows may leave.

        Args:
            errors: of the rows in the order of leaving `[n]`; without a bound, beyond the last exit's.
            exit_index: 0-based.
        """
        count, total = np.arange(1, len(errors) + 1), np.cumsum(errors)
        if self.bound is None:
            spare = self.sigmas * np.sqrt(np.cumsum(errors * errors)) if self.sigmas else 0.0
            fine = total + spare <= self.slack * count + 1e-9
        else:
            rate = total / count
            spare = self.sigmas * np.sqrt(rate * (1 - rate).clip(0) / count)
            fine = rate + spare < self.bound[exit_index] + self.slack
        fine[: self.min_leavers - 1] = False
        return fine


class RankedExits:
    """Rows sorted by the score of every exit, once for all the rules that choose thresholds exit by exit.

    Args:
        scores: `[N, E]`.
        errors: `[N, E]`: error of each exit's answer, one minus its quality.
        lowest, counts: see `candidates`.
    """

    def __init__(self, scores: Array, errors: Array, lowest: float, counts: bool) -> None:
        self.scores, self.lowest, self.counts = scores, lowest, counts
        self.order = [np.argsort(-column, kind="stable") for column in scores.T[:-1]]
        self.errors = [errors[order, index] for index, order in enumerate(self.order)]
        self.excess = [wrong - errors[order, -1] for wrong, order in zip(self.errors, self.order, strict=True)]
        self.places, self.allowed = [], []  # of each row's score among the different ones; how many rows may be cut behind
        for index, order in enumerate(self.order):
            score = scores[order, index]
            self.places.append(np.cumsum(np.append(False, score[1:] < score[:-1]), dtype=np.int32))
            self.allowed.append(int(((score >= lowest) & (score > -np.inf)).sum()))

    def thresholds(self, rule: LeaverRule) -> tuple[Array, NDArray[np.int64]]:
        """One threshold per exit, in order: each exit takes as many of the rows that reached it as the rule allows.

        Returns:
            Thresholds `[E - 1]`, nan for exits that cannot satisfy the rule, and the exit index of each row `[N]`.
        """
        rows, exits = self.scores.shape
        thresholds, taken = np.full(exits - 1, np.nan), np.full(rows, exits - 1)
        staying = np.ones(rows, dtype=bool)
        here = np.arange(rows)  # positions in the exit's order of the rows that reached it
        for index, order in enumerate(self.order):
            errors = (self.excess if rule.bound is None else self.errors)[index]
            if not staying.all():
                here = np.flatnonzero(staying.take(order))
                errors = errors.take(here)
            last = self._last_leaver(rule.holds(errors, index), here, index)
            if last is None:
                continue
            score = self.scores[order[here[last]], index]
            below = self.scores[order[here[last + 1]], index] if last + 1 < len(here) else -np.inf
            cut = score if self.counts or not np.isfinite(below) else cut_between(np.array(below), np.array(score))
            thresholds[index] = max(float(cut), self.lowest)
            leaving = order.take(here[: last + 1])
            staying[leaving] = False
            taken[leaving] = index
        return thresholds, taken

    def _last_leaver(self, fine: NDArray[np.bool_], here: NDArray[np.int64], index: int) -> int | None:
        """The last of the rows at positions `here` of an exit's order who may leave; equal scores leave together."""
        fine[np.searchsorted(here, self.allowed[index]) :] = False
        if (last := _last(fine)) is not None and last + 1 < len(here):
            places = self.places[index]
            if places[here[last]] == places[here[last + 1]]:
                places = places.take(here)
                fine[:-1] &= places[:-1] != places[1:]
                last = _last(fine)
        return last


def _last(true: NDArray[np.bool_]) -> int | None:
    """The last place that is true."""
    if not true.any():
        return None
    return len(true) - 1 - int(true[::-1].argmax())


def per_exit_thresholds(scores: Array, errors: Array, rule: LeaverRule, lowest: float, counts: bool) -> Array:
    """Thresholds `[E - 1]` of one rule: see `RankedExits`."""
    return RankedExits(scores, errors, lowest, counts).thresholds(rule)[0]


def per_exit_curve(
    scores: Array, quality: Array, cost: Array, rules: Sequence[LeaverRule], lowest: float, counts: bool
) -> Curve:
    """The curve of threshold vectors that a series of ever laxer rules gives.

    Args:
        scores, quality, cost, lowest, counts: see `single_threshold_curve`.
        rules: from strict to lax.
    """
    ranked, start = RankedExits(scores, 1 - quality, lowest, counts), np.arange(len(scores)) * scores.shape[1]
    gain_of = quality - quality[:, -1:]
    vectors = [np.full(scores.shape[1] - 1, np.nan)]
    figures = [(cost[-1], 0.0, 0.0)]
    for rule in rules:
        vector, taken = ranked.thresholds(rule)
        if np.array_equal(vector, vectors[-1], equal_nan=True):  # as the rule before
            figures.append(figures[-1])
        else:
            gains = gain_of.take(start + taken)
            figures.append((cost[taken].mean(), gains.mean(), gains.std() / np.sqrt(len(scores))))
        vectors.append(vector)
    costs, gains, errors = np.array(figures).T
    return Curve(np.stack(vectors), costs, gains + quality[:, -1].mean(), errors)


def exits_taken(scores: Array, thresholds: Array) -> NDArray[np.int64]:
    """Exit index of each row `[N]`, for thresholds `[E - 1]` with nan for closed exits."""
    taken = np.full(len(scores), scores.shape[1] - 1, dtype=np.int64)
    for index in np.flatnonzero(~np.isnan(thresholds))[::-1]:
        taken[scores[:, index] >= thresholds[index]] = index
    return taken
