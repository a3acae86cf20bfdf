"""An exact test of a difference in quality, where some rows lose by an early answer and others gain by it."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .search import Array

CREDITS = (0, 5, 6, 7, 8, 9)  # tenths of a loss that a gain may make good
CLOSE = 0.02  # how much of itself a p-value may be too large by
SMALL = 1e-4  # what is below needs no closer figure
SPANS = 800  # narrow enough for Chernoff bounds to settle most of them
CHUNK = 16  # of those looked at together
STEEPNESS = np.geomspace(0.01, 8.0, 60)  # exponents of Chernoff bounds, which hold for any; more of them are closer


def paired_p(
    losses: int, gains: int, num_rows: int, limit: float, credit: int, levels: tuple[float, float] = (SMALL, 1.0)
) -> float:
    """p-value of "the mean of losses of -1, 0 and 1 is above `limit`": small where losses minus credited gains are few.

    It is the largest chance, over every share of gains that there may be, of a total that is as small. No more than a part
    of a gain is credited: were all of it, that chance would grow with the share of gains, and nothing could fall.
    Without credit it is the binomial test of the losses.

    Args:
        losses, gains: rows with a loss of 1 and of -1.
        num_rows: n.
        limit: in (0, 1).
        credit: tenths of a loss that a gain makes good, below 10; fixed before these rows are seen.
        levels: the lowest and the highest that it will be held against; which side of both it is on need not be told closer.

    Returns:
        The p-value or up to 2 % more; no more than the lowest level where it is less, and 1 where it is above the highest.

    Source: the exact unconditional test of noninferiority for pairs, Hsueh, Liu and Chen (Biometrics 57, 2001); the credit
        is ours.
    """
    return _p_value(10 * losses - credit * gains, num_rows, limit, credit, *levels)


@lru_cache(maxsize=4096)
def _p_value(score: int, num_rows: int, limit: float, credit: int, lowest: float, highest: float) -> float:
    most = (1 - limit) / 2  # share of gains, where losses exceed them by the limit
    best = float(_tails(score, num_rows, np.array([limit]), np.array([0.0]), credit)[0])
    edges = np.concatenate([[0.0], np.geomspace(min(0.25 / num_rows, most / 2), most, SPANS)])
    low, high, most_seen = edges[:-1], edges[1:], 0.0
    while len(low):
        # at one end the fewest losses of the span, at the other the most gains: no share of gains in it makes for more
        for bound in (_chernoff, _tails):
            chances = bound(score, num_rows, low + limit, high, credit)
            close = chances <= max(best * (1 + CLOSE), lowest)
            most_seen = max(most_seen, float(chances[close].max(initial=0.0)))
            low, high = low[~close], high[~close]
        middle = (low + high) / 2
        best = max(best, float(_tails(score, num_rows, middle + limit, middle, credit).max(initial=0.0)))
        if best > highest:
            return 1.0
        low, high = np.stack([low, middle]).T.ravel(), np.stack([middle, high]).T.ravel()
    return min(1.0, max(best, most_seen))


def best_credit(losses: float, gains: float, num_rows: int, limit: float, level: float) -> int:
    """The credit with which rows like these would be certified most surely, judged by Chernoff's bound; see `paired_p`.

    Args:
        losses, gains: expected among the rows.
        num_rows: n.
        limit: in (0, 1).
        level: what p-values will be held against; a credit under which rows without any loss fail it is out of the question.
    """

    def log_p(credit: int) -> float:
        steepness = STEEPNESS[np.exp(-STEEPNESS) + np.exp(credit / 10 * STEEPNESS) <= 2]  # no gains at all are the worst
        totals = steepness * (losses - credit / 10 * gains) + num_rows * np.log1p(limit * np.expm1(-steepness))
        return float(totals.min())

    by_promise = sorted(CREDITS, key=log_p)
    return next(
        credit for credit in by_promise if not credit or paired_p(0, 0, num_rows, limit, credit, (level, level)) <= level
    )


def _tails(score: int, num_rows: int, loss_shares: Array, gain_shares: Array, credit: int) -> Array:
    """Chances that ten times the losses minus `credit` times the gains is at most `score`, for ascending shares `[K]`."""
    parts = [
        _tails_near(score, num_rows, loss_shares[start : start + CHUNK], gain_shares[start : start + CHUNK], credit)
        for start in range(0, len(gain_shares), CHUNK)
    ]
    return np.concatenate([np.empty(0), *parts])


def _tails_near(score: int, num_rows: int, loss_shares: Array, gain_shares: Array, credit: int) -> Array:
    """The same for shares that lie close together, so that the same numbers of gains are to be expected for all."""
    from scipy.special import bdtr, bdtrc, betaln, xlog1py, xlogy

    ends = [num_rows * float(gain_shares[place]) for place in (0, -1)]
    first = max(0, math.floor(ends[0] - 7 * math.sqrt(ends[0]) - 25))  # rarer ones are taken for enough
    last = min(num_rows, math.ceil(ends[1] + 7 * math.sqrt(ends[1]) + 25))
    gains, losing, gaining = np.arange(first, last + 1), loss_shares[:, None], gain_shares[:, None]
    logs = xlogy(gains, gaining) + xlog1py(num_rows - gains, -gaining) - betaln(gains + 1, num_rows - gains + 1)
    allowed = (score + credit * gains) // 10
    reach = bdtr(allowed.clip(0, num_rows - gains).astype(float), num_rows - gains, np.minimum(1.0, losing / (1 - gaining)))
    within: Array = (np.exp(logs) / (num_rows + 1) * np.where(allowed < 0, 0.0, reach)).sum(1)
    if first:
        within += bdtr(float(first - 1), num_rows, gain_shares)
    if last < num_rows:
        within += bdtrc(float(last), num_rows, gain_shares)
    return within


def _chernoff(score: int, num_rows: int, loss_shares: Array, gain_shares: Array, credit: int) -> Array:
    """What `_tails` are at most."""
    one = np.outer(loss_shares, np.expm1(-STEEPNESS)) + np.outer(gain_shares, np.expm1(credit / 10 * STEEPNESS))
    totals: Array = (score / 10 * STEEPNESS + num_rows * np.log1p(one)).min(1)
    bounds: Array = np.exp(totals.clip(max=0.0))
    return bounds
