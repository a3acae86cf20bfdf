"""Thresholds that fall as a caption grows: early words are worth more care than late ones."""

from __future__ import annotations

import math

from .base import ExitPolicy

KEPT = 0.9


def decayed(policy: ExitPolicy, decay: float, token: int) -> ExitPolicy:
    """The policy for the token that comes after `token` others.

    Args:
        policy: with the thresholds t that were calibrated; counting rules stay as they are.
        decay: how fast thresholds fall per token, 0 or above.
        token: 0 for the first.

    Returns:
        The policy with thresholds `0.9 t + 0.1 h exp(-decay * token)`, where h is the rule's highest threshold, or t where
        it has none.

    Paper: CALM (https://arxiv.org/abs/2207.07061), section 3.4, with `decay` for its temperature over the longest length.
    """
    if policy.counts:
        return policy
    fading = (1 - KEPT) * math.exp(-decay * token)
    bounded = math.isfinite(policy.highest_threshold)
    return policy.with_thresholds(
        tuple(
            t
            if t is None
            else max(policy.lowest_threshold, KEPT * t + fading * (policy.highest_threshold if bounded else t))
            for t in policy.thresholds
        )
    )
