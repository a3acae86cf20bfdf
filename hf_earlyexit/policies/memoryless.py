"""What rules share that look at one exit at a time."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch

from .base import ExitPolicy


class NoState(NamedTuple):
    """Nothing is remembered."""


class MemorylessPolicy(ExitPolicy):
    """A rule without memory. Scores are at most 1, unless a rule says otherwise."""

    uses_history: ClassVar[bool] = False
    highest_score: ClassVar[float] = 1.0

    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> NoState:
        return NoState()
