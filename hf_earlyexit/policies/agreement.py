"""The running memory of rules that compare an exit with the one before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..problem_types import same_prediction


class Chain(NamedTuple):
    """A chain of exits that say the same.

    Attributes:
        previous: logits of the last exit looked at, `[B, C]`, float32.
        started: whether there was one, `[B]`.
        total: what the chain adds up to, `[B]`, float32.
    """

    previous: Tensor
    started: Tensor
    total: Tensor

    @classmethod
    def empty(cls, batch_size: int, num_classes: int, device: torch.device | str) -> Chain:
        """The chain before the first exit."""
        return cls(
            torch.zeros(batch_size, num_classes, device=device),
            torch.zeros(batch_size, dtype=torch.bool, device=device),
            torch.zeros(batch_size, device=device),
        )

    def agrees(self, logits: Tensor, problem_type: str, tolerance: float = 0.0) -> Tensor:
        """Whether these logits say what the last exit said, `[B]`; false at the first exit."""
        return self.started & same_prediction(self.previous, logits, problem_type, tolerance)

    def follow(self, logits: Tensor, total: Tensor) -> Chain:
        """The chain after an exit with these float32 logits."""
        return Chain(logits, torch.ones_like(self.started), total)
