"""The running memory of rules that compare an exit with the one before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, agreeing

DTYPES = {SINGLE_LABEL: torch.long, MULTI_LABEL: torch.bool, REGRESSION: torch.float32}


class Chain(NamedTuple):
    """A chain of exits that say the same.

    Attributes:
        predicted: `predictions` of the last exit looked at: class numbers `[B]`, or booleans or values `[B, C]`.
        started: whether there was one, `[B]`.
        total: what the chain adds up to, `[B]`, float32.
    """

    predicted: Tensor
    started: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, num_classes: int, device: torch.device | str, problem_type: str) -> Chain:
        """The chain before the first exit."""
        shape = (batch_size,) if problem_type == SINGLE_LABEL else (batch_size, num_classes)
        return cls(
            torch.zeros(shape, dtype=DTYPES[problem_type], device=device),
            torch.zeros(batch_size, dtype=torch.bool, device=device),
            torch.zeros(batch_size, device=device),
        )

    def agrees(self, predicted: Tensor, problem_type: str, tolerance: float = 0.0) -> Tensor:
        """Whether an exit with these predictions agrees with the last one, `[B]`; false at the first exit."""
        return self.started & agreeing(self.predicted, predicted, problem_type, tolerance)

    def follow(self, predicted: Tensor, total: Tensor) -> Chain:
        """The chain after an exit with these predictions."""
        return Chain(predicted, torch.ones_like(self.started), total)
