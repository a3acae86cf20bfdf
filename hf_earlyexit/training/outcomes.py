"""How every exit fares on rows, or on tokens of texts: what rewards and hardness are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

from torch import Tensor

from ..losses.base import row_losses
from ..metrics import right_exits
from ..trace import ExitTrace


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes:
    """N rows or tokens under every exit.

    Args:
        losses: `[N, E]`, float32.
        exit_layers: layer (1-based) of each exit.
        find_right: gives `right`; it raises where rows are values, which are never right or wrong.
    """

    losses: Tensor
    exit_layers: tuple[int, ...]
    find_right: Callable[[], Tensor]

    @property
    def right(self) -> Tensor:
        """Whether each exit is right, `[N, E]`."""
        return self.find_right()

    @classmethod
    def of(cls, trace: ExitTrace) -> Self:
        """Those of a trace's rows."""
        losses = row_losses(trace.logits, trace.labels, trace.problem_type)
        return cls(losses=losses, exit_layers=tuple(trace.exit_layers), find_right=partial(right_exits, trace))

    @classmethod
    def of_tokens(cls, losses: Tensor, right: Tensor, exit_layers: tuple[int, ...]) -> Self:
        """Those of tokens.

        Args:
            losses, right: `[N, E]`.
            exit_layers: layer (1-based) of each exit.
        """
        return cls(losses=losses, exit_layers=exit_layers, find_right=lambda: right)
