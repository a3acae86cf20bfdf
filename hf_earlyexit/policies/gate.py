"""Leave where the exit's gate says so: the rule that goes with learned gates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..citations import CONSISTENTEE
from ..errors import PolicyError
from .base import ExitSignal, register_policy
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
    uses_logits: ClassVar[bool] = False
    uses_gate: ClassVar[bool] = True

    @classmethod
    def half(cls, num_exits: int, **fields: Any) -> Self:
        """The paper's policy: threshold one half at every exit."""
        return cls(thresholds=(HALF,) * (num_exits - 1), **fields)

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        if exit_index == self.num_exits - 1:  # has no gate: whoever is left leaves
            return state, torch.ones(signal.logits.shape[:1], device=signal.logits.device), signal.logits
        _require_gates(signal.gate)
        return state, probability(signal.gate.float()), signal.logits  # type: ignore[union-attr]

    @classmethod
    def learn(cls, trace: Any, **options: Any) -> dict[str, Any]:
        """Nothing to learn; refuses a trace of a model without gates before anything is computed.

        Raises:
            PolicyError: for a trace without gates.
        """
        if trace.num_exits > 1:
            _require_gates(trace.gates)
        return options


def _require_gates(gates: Tensor | None) -> None:
    if gates is None:
        raise PolicyError(
            "The gate policy reads gates, and there are none: load the model with exit_gate='mlp', train it with "
            "ConsistentTrainer, and collect the trace again.",
            field="gates",
        )
