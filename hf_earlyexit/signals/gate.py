"""What an exit's learned gate says."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .base import ExitPoint, Lack, Signal, missing, register_signal


@register_signal("gate")
class GateSignal(Signal):
    """The leave logit of the exit's gate: above 0 where leaving is more likely than not."""

    words: ClassVar[str] = "gates"
    cure: ClassVar[str] = (
        "load the model with exit_gate='mlp', train it with ConsistentTrainer, and collect the trace again; captioners take "
        "exit_gate='linear' and EarlyExitCaptioningTrainer(learn_gates=True)"
    )
    at_last: ClassVar[bool] = False
    learned: ClassVar[bool] = True

    @staticmethod
    def of(point: ExitPoint) -> Tensor:
        if point.gate is None:
            raise missing("gate")
        leave_logits: Tensor = point.gate(point.pooled, point.logits)
        return leave_logits

    @classmethod
    def lacks(cls, config: Any) -> Lack | None:
        if config.exit_gate is not None:
            return None
        return Lack("exit_gate", f"a kind of gate, {' or '.join(config.gates.names())}")
