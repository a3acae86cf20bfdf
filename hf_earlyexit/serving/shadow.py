"""Rows that have left and run on to the last layer, so that a monitor can compare both answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..problem_types import same_prediction
from .answers import Leaving
from .chunks import Chunk, some_rows
from .course import Course
from .scheduler import Scheduler


class Shadow:
    """Follows some of the rows that a course lets go: each runs on from the exit it left at, in batches of their own.

    No layer is run twice, and whoever is still in the course is in the very batches as without a shadow, so no answer
    changes in any bit.

    Args:
        scheduler: of the course; it must have a policy.
        chosen: whether a row is followed, by its place.
        record: told whether both answers are the same, of every followed row for which both are finite.
        broken: as for `Course`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        chosen: Callable[[Any], bool],
        record: Callable[[list[bool]], Any],
        broken: Callable[[Sequence[Any], Exception], Any] | None = None,
    ) -> None:
        assert scheduler.policy is not None
        self.scheduler, self.chosen, self.record = scheduler, chosen, record
        self.problem_type = scheduler.policy.problem_type
        self.early: dict[Any, Tensor] = {}  # answers of the rows that are under way, by place
        full = Scheduler(scheduler.walker, None, scheduler.max_batch_tokens, stops=scheduler.stops)
        self.course = Course(full, lambda: None, self._compare, broken=broken)

    def follow(self, chunk: Chunk, leaving: Leaving) -> None:
        """Take up those who were chosen among the rows of a chunk that leave; run on those who fill a batch."""
        chosen = {place: number for number, place in enumerate(leaving.places) if self.chosen(place)}
        if not chosen:
            return
        self.early |= {place: leaving.answer[number] for place, number in chosen.items()}
        rows = [row for row, place in enumerate(chunk.places) if place in chosen]
        self.course.enter(some_rows(chunk, rows)._replace(passed=None))
        while self.course.ready and self.step():
            pass

    def step(self) -> bool:
        """Run one batch on, however small; False if there is none, or the time of the followed course is over."""
        return not self.scheduler.late() and self.course.step()

    def _compare(self, leaving: Leaving) -> None:
        early = torch.stack([self.early.pop(place) for place in leaving.places])
        finite = (early.isfinite() & leaving.answer.isfinite()).all(1)
        same = same_prediction(early[finite], leaving.answer[finite], self.problem_type)
        self.record(same.tolist())
