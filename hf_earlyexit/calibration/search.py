"""Every threshold at once: exact sweeps over the observed scores, without a loop over thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class OneThreshold:
    """Settings that have one threshold for all open exits, to be read like an array `[K, E - 1]`.

    An array would hold each of a million thresholds as often as there are exits.

    Args:
        cuts: `[K]`, nan where every exit is closed.
        open_exits: `[E - 1]`.
    """

    def __init__(self, cuts: Array, open_exits: NDArray[np.bool_]) -> None:
        self.cuts, self.open_exits = cuts, open_exits

    def __getitem__(self, places: Any) -> Array:
        """Some of the settings, nan where an exit is closed."""
        return np.where(self.open_exits, self.cuts[places, None], np.nan)


class Curve(NamedTuple):
    """What a policy costs and is worth at each of K settings, the careful ones first.

    Attributes:
        thresholds: `[K, E - 1]`, nan where an exit is closed; a long curve's are made when they are read.
        cost: mean cost in layers, `[K]`.
        quality: mean quality of the answers given, `[K]`.
        standard_error: of the difference in quality to the full model, on the same rows, `[K]`.
    """

    thresholds: Array | OneThreshold
    cost: Array
    quality: Array
    standard_error: Array


def sweep(scores: Array, values: Iterable[Array], thresholds: Array) -> list[Array]:
    """Mean over rows of what each row gets at the exit it takes, for every threshold at once.

    A row leaves at the first exit whose score reaches the threshold, hence at the first whose running maximum does; so
    each exit adds its difference to the next exit at one place of the sorted thresholds, and one cumulative sum does it.

    Args:
        scores: `[N, E]`; the last column is not read.
        values: matrices `[N, E]`: what a row gets for leaving at each exit. Each is done with before the next is asked for.
        thresholds: `[K]`, ascending.

    Returns:
        One `[K]` for each of `values`.
    """
    reached = np.maximum.accumulate(scores[:, :-1], axis=1)
    passed = np.searchsorted(thresholds, reached, side="right").ravel()  # thresholds below this index are reached
    del reached
    means = []
    for value in values:
        total = np.cumsum(np.bincount(passed, np.diff(value, axis=1).ravel(), len(thresholds) + 1), dtype=np.float64)
        total += value[:, 0].sum()
        total /= len(scores)
        means.append(total[:-1])
    return means


def means_along(path: Array, scores: Array, values: Iterable[Array]) -> list[Array]:
    """Mean over rows of what each row gets at the exit it takes, at every setting of a path.

    Args:
        path: settings `[K, E - 1]`, nan where an exit is closed.
        scores: `[N, E]`.
        values: matrices `[N, E]`, as for `sweep`.

    Returns:
        One `[K]` for each of `values`.
    """
    shared = shared_thresholds(path)
    if shared is not None:
        open_exits, cuts = shared
        order = np.argsort(cuts, kind="stable")
        seen = np.where(np.append(open_exits, True), scores, -np.inf)
        swept = sweep(seen, values, cuts[order])
        back = np.argsort(order, kind="stable")
        return [mean[back] for mean in swept]
    rows, columns = np.arange(len(scores)), np.asfortranarray(scores)
    values = list(values)
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
    costs, gains, squares = sweep(scores, of_leaving(cost, gain), cuts)
    open_exits = np.asarray(np.isfinite(scores[:, :-1]).any(0), dtype=np.bool_)
    return Curve(
        OneThreshold(np.append(cuts, np.nan)[::-1], open_exits),
        np.append(costs, cost[-1])[::-1],
        np.append(gains, 0.0)[::-1] + quality[:, -1].mean(),
        np.append(standard_error(gains, squares, len(scores)), 0.0)[::-1],
    )


def of_leaving(cost: Array, gain: Array) -> Iterator[Array]:
    """What settings are judged by, for `sweep`: costs, gains and their squares `[N, E]`.

    Args:
        cost: of leaving at each exit `[E]`.
        gain: in quality over the last exit `[N, E]`.
    """
    yield np.broadcast_to(cost, gain.shape)
    yield gain
    yield gain**2


def standard_error(means: Array, squares: Array, count: int) -> Array:
    """Of a mean over `count` rows, from means of the values and of their squares."""
    return np.sqrt((squares - means**2).clip(0) / count)


def exits_taken(scores: Array, thresholds: Array) -> NDArray[np.int64]:
    """Exit index of each row `[N]`, for thresholds `[E - 1]` with nan for closed exits."""
    taken = np.full(len(scores), scores.shape[1] - 1, dtype=np.int64)
    for index in np.flatnonzero(~np.isnan(thresholds))[::-1]:
        taken[scores[:, index] >= thresholds[index]] = index
    return taken
