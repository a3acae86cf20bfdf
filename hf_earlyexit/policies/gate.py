"""Leave where the exit's gate says so: the rule that goes with learned gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..citations import CONSISTENTEE
from ..signals import ExitSignal
from .base import register_policy
from .measures import probability
from .memoryless import MemorylessPolicy, NoState

HALF = 0.5


@register_policy("gate")
@dataclass(frozen=True, kw_only=True)
class GatePolicy(MemorylessPolicy):
    """Leave where the gate's probability of leaving reaches the threshold, in `[0, 1]`.

    It needs a model with gates (`exit_gate` in its config) that were trained, as `ConsistentTrainer` does.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882) leaves above one half. Any other threshold gives another point on
    a curve from the same model, so `calibrate` serves it like every rule.
    """

    citation: ClassVar[tuple[str, ...]] = (CONSISTENTEE,)
    asks: ClassVar[tuple[str, ...]] = ("gate",)

    @classmethod
    def half(cls, num_exits: int, **fields: Any) -> Self:
        """The paper's policy: threshold one half at every exit."""
        return cls(thresholds=(HALF,) * (num_exits - 1), **fields)

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        if exit_index == self.num_exits - 1:  # has no gate: whoever is left leaves
            return state, torch.ones(signal.logits.shape[:1], device=signal.logits.device), signal.logits
        return state, probability(signal.scalar("gate")), signal.logits
