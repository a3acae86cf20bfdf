"""The rows that left early and wrong: what to read before trusting a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..policies.base import ExitPolicy
from ..problem_types import REGRESSION, SINGLE_LABEL, given_labels, predictions, row_quality
from ..trace import ExitTrace


class Mistake(NamedTuple):
    """One row that left before the last exit with a wrong answer.

    Attributes:
        row: its place in the trace.
        layer: it left after.
        score: it left with.
        truth, answer, last_answer: the label, the answer it left with, the last exit's answer; in words.
        harmed: whether the last exit would have done better.
    """

    row: int
    layer: int
    score: float
    truth: str
    answer: str
    last_answer: str
    harmed: bool


class Mistakes(NamedTuple):
    """How many rows left early, how many of them wrong, how many of those harmed, and the worst of them."""

    num_early: int
    num_wrong: int
    num_harmed: int
    worst: tuple[Mistake, ...]


def find_mistakes(
    policy: ExitPolicy, trace: ExitTrace, label_names: Sequence[str] | None = None, most: int = 20
) -> Mistakes:
    """Replay a policy and keep the rows that leaving early cost most, then those that were wrong anyway.

    Args:
        policy: with thresholds.
        trace: labelled rows; for values (regression) every answer that is not exact counts as wrong.
        label_names: one for each class; numbers by default.
        most: rows to keep.
    """
    scores, answers = policy.scan(trace)
    taken = policy.decide(scores)
    rows = torch.arange(trace.num_rows)
    given = answers[rows, taken]
    quality = row_quality(given, trace.labels, trace.problem_type)
    lost = row_quality(trace.logits[:, -1], trace.labels, trace.problem_type) - quality
    early = taken < trace.num_exits - 1
    wrong = early & (quality < (0.0 if trace.problem_type == REGRESSION else 1.0))
    order = sorted(wrong.nonzero().flatten().tolist(), key=lambda row: (-float(lost[row]), int(taken[row]), row))
    name = _Namer(trace.problem_type, label_names)
    worst = tuple(
        Mistake(
            row=row,
            layer=trace.exit_layers[int(taken[row])],
            score=float(scores[row, taken[row]]),
            truth=name.of_label(trace.labels[row]),
            answer=name.of_logits(given[row]),
            last_answer=name.of_logits(trace.logits[row, -1]),
            harmed=bool(lost[row] > 0),
        )
        for row in order[:most]
    )
    return Mistakes(int(early.sum()), int(wrong.sum()), int((wrong & (lost > 0)).sum()), worst)


class _Namer:
    """Answers and labels in words."""

    def __init__(self, problem_type: str, label_names: Sequence[str] | None) -> None:
        self.problem_type = problem_type
        self.names = label_names

    def of_logits(self, logits: Tensor) -> str:
        answer = predictions(logits, self.problem_type)
        return self.of_label(answer if self.problem_type == REGRESSION else answer.long())

    def of_label(self, label: Tensor) -> str:
        if self.problem_type == REGRESSION:
            return ", ".join(f"{value:.3g}" for value in label.reshape(-1).tolist())
        if self.problem_type == SINGLE_LABEL:
            return self._class(int(label))
        return ", ".join(self._class(index) for index, on in enumerate(given_labels(label).tolist()) if on) or "none"

    def _class(self, index: int) -> str:
        return str(index) if self.names is None else self.names[index]
