"""Leave every row at the same exit: the yardstick of all other rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..errors import PolicyError
from ..signals import ExitSignal
from .base import register_policy
from .memoryless import MemorylessPolicy, NoState


@register_policy("static")
@dataclass(frozen=True, kw_only=True)
class StaticPolicy(MemorylessPolicy):
    """Leave at a fixed exit, whatever the row.

    The score is the exit's number (1 to E), so the threshold k means "leave at the k-th exit".
    """

    asks: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = True
    lowest_threshold: ClassVar[float] = 1.0

    @property
    def highest_threshold(self) -> float:
        return float(self.num_exits)

    @classmethod
    def at(cls, exit_index: int, num_exits: int, **fields: object) -> Self:
        """The policy that leaves at `exit_index` (0-based) of `num_exits`.

        Raises:
            PolicyError: for an exit that is not there.
        """
        if not 0 <= exit_index < num_exits:
            raise PolicyError(
                f"exit_index is {exit_index!r}; expected 0 to {num_exits - 1}.", field="exit_index", value=exit_index
            )
        closed = (None,) * (num_exits - 1)
        opened = tuple(float(index + 1) if index == exit_index else None for index in range(num_exits - 1))
        return cls(thresholds=opened if exit_index < num_exits - 1 else closed, **fields)  # type: ignore[arg-type]

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        number = torch.full(signal.logits.shape[:1], float(exit_index + 1), device=signal.logits.device)
        return state, number, signal.logits
