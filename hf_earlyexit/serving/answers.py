"""What rows left with, gathered on the host in the order they came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import EarlyExitError
from ..modeling.finite import not_finite

POLICY, LAST_LAYER, LAYER_BUDGET, DEADLINE, ERROR = "policy", "last layer", "layer budget", "deadline", "error"


class Answer(NamedTuple):
    """One row's answer: logits `[C]`, the layer it left after, its score there, why it left, and its error, if any."""

    logits: Tensor
    exit_layer: int
    exit_score: float
    reason: str
    error: EarlyExitError | None


class Leaving(NamedTuple):
    """Rows that leave together: their places, the answer `[B, C]`, exit index and score `[B]` they leave with, and why."""

    places: list[Any]
    answer: Tensor
    exit_index: int
    score: Tensor
    reasons: list[str]


@dataclass
class Answers:
    """Answers of N rows on the host, filled as rows leave; a row without one has nan, exit index -1 and the reason why."""

    logits: Tensor
    exit_index: Tensor
    score: Tensor
    reason: list[str]
    errors: dict[int, EarlyExitError] = field(default_factory=dict)

    @classmethod
    def blank(cls, rows: int, num_classes: int) -> Answers:
        """No answers yet."""
        nan = torch.full((rows, num_classes), torch.nan)
        return cls(nan, torch.full((rows,), -1), torch.full((rows,), torch.nan), [DEADLINE] * rows)

    def write(self, groups: Sequence[Leaving]) -> None:
        """Put down what rows left with."""
        if not groups:
            return
        places = torch.tensor([place for group in groups for place in group.places])
        self.logits[places] = torch.cat([group.answer for group in groups]).float().cpu()
        self.score[places] = torch.cat([group.score for group in groups]).float().cpu()
        self.exit_index[places] = torch.tensor([group.exit_index for group in groups for _ in group.places])
        for group in groups:
            for place, reason in zip(group.places, group.reasons, strict=True):
                self.reason[place] = reason

    def refuse_what_is_not_finite(self, first: int) -> None:
        """Put an error in the place of every answer that is not finite.

        Args:
            first: the number of the first row, for the errors.
        """
        answered = self.exit_index >= 0
        for place in (answered & ~self.logits.isfinite().all(1)).nonzero().flatten().tolist():
            self.errors[place] = not_finite(first + place)
            self.logits[place], self.score[place] = torch.nan, torch.nan
            self.exit_index[place], self.reason[place] = -1, ERROR
