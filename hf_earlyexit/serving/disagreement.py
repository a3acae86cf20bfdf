"""Bounds of a share that hold however often they are looked at; `Monitor` tells the source."""

from __future__ import annotations

import math
from collections.abc import Callable


def disagreement_bounds(different: int, shadowed: int, delta: float) -> tuple[float, float]:
    """Bounds of a share, from k of n, that hold for all n at once with probability 1 - delta.

    They hold the shares p at which the likelihood of what was seen, averaged over all shares, is below 1 / delta of p's own.
    """
    from scipy.special import betaln

    if not shadowed:
        return 0.0, 1.0
    threshold = float(betaln(different + 1, shadowed - different + 1)) + math.log(delta)

    def inside(share: float) -> bool:
        wrong = different * math.log(share) if different else 0.0
        right = (shadowed - different) * math.log1p(-share) if different < shadowed else 0.0
        return wrong + right > threshold

    middle = different / shadowed
    return _edge(inside, middle, 0.0), _edge(inside, middle, 1.0)


def _edge(inside: Callable[[float], bool], within: float, end: float) -> float:
    """Where a range that holds `within` ends on the way to `end`."""
    for _ in range(60):
        middle = (within + end) / 2
        if 0 < middle < 1 and inside(middle):
            within = middle
        else:
            end = middle
    return end
