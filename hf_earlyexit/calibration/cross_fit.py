"""What a choice of thresholds is worth on rows that did not make it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from .quality import compare_rows
from .settings import Pool, Recipe, choose

LEAST_ROWS = 50  # of a fold
FOLDS, FOLDS_OF_MANY, MANY_ROWS = 10, 5, 10_000


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What rows not seen can be expected to get, from repeating the whole choice without a part of the rows.

    Attributes:
        difference: quality of the early answers minus the full model's, all folds together.
        standard_error: of it.
        mean_layers: per row.
        num_folds: times the choice was repeated; num_rows: that were judged, each by thresholds it did not choose.
    """

    difference: float
    standard_error: float
    mean_layers: float
    num_folds: int
    num_rows: int

    @classmethod
    def from_dict(cls, values: Any) -> Expectation:
        """What `dataclasses.asdict` made.

        Raises:
            CheckpointError: for missing, unknown or impossible values.
        """
        try:
            expectation = cls(**values)
            finite = np.isfinite([expectation.difference, expectation.standard_error, expectation.mean_layers]).all()
        except TypeError as error:
            raise CheckpointError(f"expected cannot be read ({error}).", field="expected") from error
        if not finite:
            raise CheckpointError(f"expected holds a number that is not finite: {values!r}.", field="expected")
        return expectation

    def __str__(self) -> str:
        return (
            f"expected on rows not seen: {self.difference:+.4f} (standard error {self.standard_error:.4f}) at "
            f"{self.mean_layers:.2f} mean layers, from {self.num_folds} folds"
        )


def expect(recipe: Recipe, pool: Pool, folds: int | None = None) -> Expectation | None:
    """Repeat a choice on all rows but a fold's, judge it on the fold, fold by fold.

    Where the target cannot be met without a fold, its rows run through the full model.

    Args:
        recipe: how thresholds are chosen.
        pool: all rows.
        folds: most folds; fewer where a fold would have less than 50 rows. By default 10, so that each choice has nine
            tenths of the rows: of few rows, a fifth less is often another choice. Above 10,000 rows 5, for their time.

    Returns:
        `None` where two folds of 50 rows are not to be had, or fewer than 2 are asked for.
    """
    trace = pool.trace
    if folds is None:
        folds = FOLDS if trace.num_rows <= MANY_ROWS else FOLDS_OF_MANY
    count = min(folds, trace.num_rows // LEAST_ROWS)
    if count < 2:
        return None
    order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(recipe.seed + 1))
    taken, answered = torch.empty(trace.num_rows, dtype=torch.long), []
    for places in order.tensor_split(count):
        kept = torch.ones(trace.num_rows, dtype=torch.bool)
        kept[places] = False
        taken[places], answers = _judged(recipe, pool, kept.nonzero().flatten(), places)
        if answers is not None:
            answered.append((places, answers))
    left_at = torch.arange(trace.num_rows), taken
    if recipe.metric.is_row_quality and not answered:
        compared = compare_rows(pool.full_quality[left_at], pool.full_quality[:, -1].contiguous())
    else:
        early = trace.logits[left_at]  # at the end, when what the folds needed is gone
        for places, answers in answered:
            early[places] = answers.to(early.dtype)
        compared = recipe.metric.compare(early, trace.logits[:, -1], trace.labels, trace.problem_type)
    return Expectation(
        difference=compared.quality - compared.full_quality,
        standard_error=compared.standard_error,
        mean_layers=float(np.asarray(trace.exit_layers)[taken.numpy()].mean()),
        num_folds=count,
        num_rows=trace.num_rows,
    )


def _judged(recipe: Recipe, pool: Pool, others: Tensor, fold: Tensor) -> tuple[Tensor, Tensor | None]:
    """Exits `[n]` that a fold's rows take under thresholds that the other rows chose, and the answers there `[n, C]`.

    No answers are given where they are the exits' own.
    """
    try:
        policy = choose(recipe, pool, others).policy
    except CalibrationError:
        return torch.full((len(fold),), pool.trace.num_exits - 1), None
    scores, answers = pool.scan(policy)
    taken = policy.decide(scores[fold])
    return taken, None if answers is pool.trace.logits else answers[fold, taken]
