"""Settings worth a real run: thresholds that a token trace puts forward."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from .exit_by_exit import LeaverRule, thresholds_by_rule
from .search import Array, single_threshold_curve

ONE, EACH = "one threshold", "per exit"
MILDEST, BOLDEST = 0.005, 0.3  # share of an exit's leavers whose word is not the full model's
MIN_LEAVERS = 10

Thresholds = tuple[float | None, ...]


class Proposal(NamedTuple):
    """Thresholds to try.

    Attributes:
        kind: "one threshold" or "per exit".
        thresholds: one per exit but the last.
        trace_layers: mean layers of the trace's tokens under them; a real run may differ.
    """

    kind: str
    thresholds: Thresholds
    trace_layers: float


def propose(scores: Array, agrees: Array, layers: Array, count: int, lowest: float, counts: bool) -> list[Proposal]:
    """Thresholds spread over what a policy can do on the tokens of a trace, each different.

    Half of them are one threshold for all exits, evenly spaced in mean layers. The others have a threshold per exit: the
    lowest at which no more than a share of the exit's leavers has another word than the full model's, for growing shares.

    Args:
        scores: `[N, E]`, -inf at muted exits; the last column is not read.
        agrees: whether each exit's word is the full model's `[N, E]`, 0 or 1.
        layers: of the exits `[E]`.
        count: most proposals, at least 2.
        lowest, counts: of the policy.
    """
    proposals: dict[Thresholds, Proposal] = {}

    def add(kind: str, vector: Array, mean_layers: float) -> None:
        if not np.isnan(vector).all():  # a setting that closes every exit is the full model, which is tried anyway
            key = tuple(None if math.isnan(value) else float(value) for value in vector)
            proposals.setdefault(key, Proposal(kind, key, mean_layers))

    curve = single_threshold_curve(scores, agrees, layers, lowest, counts)
    for wanted in np.linspace(layers[-1], curve.cost.min(), count // 2 + 2)[1:-1]:
        place = int(np.abs(curve.cost - wanted).argmin())
        add(ONE, curve.thresholds[place], float(curve.cost[place]))
    bounds = [np.full(scores.shape[1] - 1, share) for share in np.geomspace(MILDEST, BOLDEST, count - count // 2)]
    rules = [LeaverRule(bound, min_leavers=MIN_LEAVERS) for bound in bounds]
    for vector, leaving in thresholds_by_rule(scores, 1 - agrees, rules, lowest, counts):
        add(EACH, vector, float(layers[leaving.left].mean()))
    return list(proposals.values())
