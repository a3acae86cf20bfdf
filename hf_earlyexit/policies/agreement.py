"""The running memory of rules that compare an exit with the one before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, same_answer

SAID = {SINGLE_LABEL: torch.long, MULTI_LABEL: torch.bool, REGRESSION: torch.float32}


class Chain(NamedTuple):
    """A chain of exits that say the same.

    Attributes:
        said: what the last exit looked at said: `[B]` class numbers, `[B, C]` booleans of many labels, or values.
        started: whether there was one, `[B]`.
        total: what the chain adds up to, `[B]`, float32.
    """

    said: Tensor
    started: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, num_classes: int, device: torch.device | str, problem_type: str) -> Chain:
        """The chain before the first exit."""
        shape = (batch_size,) if problem_type == SINGLE_LABEL else (batch_size, num_classes)
        return cls(
            torch.zeros(shape, dtype=SAID[problem_type], device=device),
            torch.zeros(batch_size, dtype=torch.bool, device=device),
            torch.zeros(batch_size, device=device),
        )

    def agrees(self, said: Tensor, problem_type: str, tolerance: float = 0.0) -> Tensor:
        """Whether an exit says what the last one said, `[B]`; false at the first exit."""
        return self.started & same_answer(self.said, said, problem_type, tolerance)

    def follow(self, said: Tensor, total: Tensor) -> Chain:
        """The chain after an exit that said so."""
        return Chain(said, torch.ones_like(self.started), total)
