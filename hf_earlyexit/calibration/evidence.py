"""p-values for "the mean loss is too high", and what can be concluded from many of them taken in order.

All of it holds for rows that are drawn alike and independently of each other, at any number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .search import Array

STARTS = 4  # of the fallback procedure


def binomial_p(total: float, num_rows: int, limit: float) -> float:
    """Exact p-value of "the mean of losses of 0 and 1 is above `limit`".

    Args:
        total: sum of the losses.
        num_rows: n.
        limit: in (0, 1).

    Source: the binomial test; the null is hardest to reject at a mean of exactly `limit`.
    """
    from scipy.special import bdtr

    return float(bdtr(float(round(total)), num_rows, limit))


def betting_p(losses: Array, counts: Array, limit: float, share: float) -> float:
    """p-value of "the mean of losses in [0, 1] is above `limit`" from a bet against it.

    A gambler who stakes a fixed share on each loss being below the limit cannot expect to gain if the mean is above it; the
    p-value is one over what has become of the stake. It adapts to losses that hardly vary.

    Args:
        losses: values in [0, 1].
        counts: how often each occurred.
        limit: in (0, 1).
        share: of the largest possible stake, in (0, 1); fixed before these losses are seen.

    Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting
        (https://arxiv.org/abs/2010.09686): a constant bet, one-sided, at the last row.
    """
    gains = np.log1p(share / (1 - limit) * (limit - losses))
    return math.exp(min(0.0, -float(gains @ counts)))


def hoeffding_bentkus_p(total: float, num_rows: int, limit: float) -> float:
    """p-value of "the mean of losses in [0, 1] is above `limit`" from their sum alone.

    For losses that lie near 0 or 1 it comes close to the binomial test; a bet does better where they hardly vary.

    Args:
        total: sum of the losses.
        num_rows: n.
        limit: in (0, 1).

    Source: Bates et al., Distribution-free, risk-controlling prediction sets (https://arxiv.org/abs/2101.02703), as in Learn
        then Test: the smaller of Hoeffding's bound in its tight form and e times the binomial tail (Bentkus).
    """
    from scipy.special import bdtr, rel_entr

    mean = min(total / num_rows, limit)
    hoeffding = math.exp(-num_rows * float(rel_entr(mean, limit) + rel_entr(1 - mean, 1 - limit)))
    bentkus = math.e * float(bdtr(float(math.ceil(total - 1e-9)), num_rows, limit))
    return min(hoeffding, bentkus, 1.0)


def fixed_sequence(p_value: Callable[[int], float], count: int, delta: float) -> list[int]:
    """Which hypotheses of an ordered list fall, at a chance of at most `delta` that any of them was true.

    Each is tested at `delta` as long as all before it fell; the first that stands ends the walk.

    Args:
        p_value: of a hypothesis by its place; called in order, and no further than needed.
        count: hypotheses.
        delta: in (0, 1).

    Source: fixed-sequence testing, as in Learn then Test (https://arxiv.org/abs/2110.01052).
    """
    fallen: list[int] = []
    for place in range(count):
        if p_value(place) > delta:
            break
        fallen.append(place)
    return fallen


def fallback(p_value: Callable[[int], float], count: int, delta: float, starts: int = STARTS) -> list[int]:
    """As `fixed_sequence`, but with several starts, so that one hypothesis that stands does not end it.

    `delta` is shared by the starts, evenly spaced over the list; what a hypothesis that falls was tested at is handed on to
    the next one.

    Args:
        p_value, count, delta: see `fixed_sequence`.
        starts: at least 1.

    Source: Wiens, A fixed sequence Bonferroni procedure (Pharmaceutical Statistics 2, 2003), the fallback procedure.
    """
    places = {round(start * count / starts) for start in range(starts)}
    fallen, handed_on = [], 0.0
    for place in range(count):
        level = handed_on + (delta / len(places) if place in places else 0.0)
        handed_on = 0.0
        if level > 0 and p_value(place) <= level:
            fallen.append(place)
            handed_on = level
    return fallen


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """p-values adjusted for being several, in the same order.

    Source: Holm, A simple sequentially rejective multiple test procedure (1979).
    """
    values = np.asarray(p_values, dtype=float)
    order = np.argsort(values, kind="stable")
    raised = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)).clip(max=1.0)
    adjusted = np.empty(len(values))
    adjusted[order] = raised
    return adjusted


def least_rows(p_value: Callable[[int], float], delta: float, most: int = 10**9, least: int = 0) -> int | None:
    """The least n above `least` from which a p-value that falls with n is at most `delta`; `None` if `most` do not do."""
    if p_value(most) > delta:
        return None
    low, high = least, least + 1
    while p_value(high) > delta:
        low, high = high, high * 2 - least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if p_value(middle) <= delta else (middle, high)
    return high
