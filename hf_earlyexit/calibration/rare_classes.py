"""How rare classes fare when rows leave early."""

from __future__ import annotations

import torch

from ..metrics import f1
from ..policies.base import ExitPolicy
from ..trace import ExitTrace


def early_and_full_f1(policy: ExitPolicy, trace: ExitTrace) -> tuple[float, float]:
    """F1 of the answers that rows leave with, and of the last exit's, both in `[0, 1]`; see `metrics.f1`.

    Args:
        policy: with thresholds for the trace's exits.
        trace: labelled rows of classes or many labels.
    """
    scores, answers = policy.scan(trace)
    early = answers[torch.arange(trace.num_rows), policy.decide(scores)]
    early_f1, full_f1 = (f1(logits, trace.labels, trace.problem_type) for logits in (early, trace.logits[:, -1]))
    return early_f1, full_f1
