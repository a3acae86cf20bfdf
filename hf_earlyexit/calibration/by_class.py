"""What early answers do to each class, which one figure over all rows cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..policies.scanning import SCANNED
from ..problem_types import REGRESSION, SINGLE_LABEL, given_labels, largest, predictions
from .parts import Places

MOST, WORST = 8, 5  # classes that are all shown; of more, those that lose most


@dataclass(frozen=True, kw_only=True)
class ClassReport:
    """One class, early answers beside the full model's; shares in `[0, 1]`.

    Attributes:
        label: number of the class.
        num_rows: that have it.
        f1, full_f1: of the class; 0 where it neither occurs nor is answered.
        recall, full_recall: share of its rows that are answered with it; `None` without rows.
    """

    label: int
    num_rows: int
    f1: float
    full_f1: float
    recall: float | None
    full_recall: float | None


def answers_given(logits: Tensor, problem_type: str) -> Tensor:
    """What `class_reports` judges: class numbers `[N]` of logits `[N, C]`, or booleans `[N, C]` for many labels."""
    return largest(logits) if problem_type == SINGLE_LABEL else predictions(logits, problem_type)


def answers_at(logits: Tensor, places: Places, exits: Tensor, problem_type: str) -> Tensor:
    """The same of rows at the exit that each takes, of all logits `[N, E, C]`, of which few are copied at a time."""
    rows = torch.arange(len(logits)) if places is None else places
    parts = zip(rows.split(SCANNED), exits.split(SCANNED), strict=True)
    return torch.cat([answers_given(logits[part, taken], problem_type) for part, taken in parts])


def class_reports(
    early: Tensor, full: Tensor, labels: Tensor, num_classes: int, problem_type: str
) -> tuple[ClassReport, ...]:
    """A report for each class; none for values.

    Args:
        early, full: what was answered early and by the full model: see `answers_given`.
        labels: `[N]` class numbers, or `[N, C]`.
        num_classes: C.
        problem_type: what they mean.
    """
    if problem_type == REGRESSION:
        return ()
    single = problem_type == SINGLE_LABEL
    truth = labels if single else given_labels(labels)
    rows = _counts(truth, num_classes) if single else truth.sum(0)
    f1s, recalls = [], []
    for answer in (early, full):
        right = _counts(truth[answer == truth], num_classes) if single else (answer & truth).sum(0)
        answered = _counts(answer, num_classes) if single else answer.sum(0)
        both = right.double()
        f1s.append((2 * both / (answered + rows).clamp_min(1)).tolist())
        recalls.append([float(right / count) if count else None for right, count in zip(both, rows, strict=True)])
    return tuple(
        ClassReport(label=label, num_rows=count, f1=f1, full_f1=full_f1, recall=recall, full_recall=full_recall)
        for label, (count, f1, full_f1, recall, full_recall) in enumerate(zip(rows.tolist(), *f1s, *recalls, strict=True))
    )


def _counts(classes: Tensor, num_classes: int) -> Tensor:
    """How often each class is there, `[C]`; never a table of rows by classes, which may be words."""
    return torch.bincount(classes, minlength=num_classes)


def to_show(reports: Sequence[ClassReport]) -> list[ClassReport]:
    """All classes where they are few; else those whose F1 falls most."""
    if len(reports) <= MOST:
        return list(reports)
    return sorted(reports, key=lambda report: report.f1 - report.full_f1)[:WORST]


def class_lines(reports: Sequence[ClassReport], names: Sequence[str] | None = None) -> list[str]:
    """A table in words, by the classes' names or numbers; no line for no classes."""
    if not reports:
        return []
    shown = to_show(reports)
    some = "" if len(shown) == len(reports) else f" (the {len(shown)} of {len(reports)} that lose most)"
    lines = [f"by class{some}", "class                  rows       F1  full model   recall  full model"]
    for report in shown:
        name = str(report.label) if names is None else names[report.label]
        recalls = ("-" if value is None else f"{value:.4f}" for value in (report.recall, report.full_recall))
        early, full = recalls
        lines.append(f"{name[:20]:20s} {report.num_rows:6d} {report.f1:8.4f} {report.full_f1:11.4f} {early:>8s} {full:>11s}")
    return lines
