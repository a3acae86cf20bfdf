"""A policy as a graph: its own `step`, folded over the exits it looks at."""

from __future__ import annotations

import onnx
import torch
from torch import Tensor, nn

from ..errors import PolicyError
from ..policies import ExitPolicy
from ..signals import ExitSignal
from .walk import export, logits_of, scalar_of

PREFIX = "policy."


class _Fold(nn.Module):
    def __init__(self, policy: ExitPolicy, num_classes: int) -> None:
        super().__init__()
        self.policy, self.num_classes = policy, num_classes
        self.asked = [index for index in range(policy.num_exits) if policy.wants(index)]
        self.scalars = [(name, index) for index in self.asked for name in policy.asks_at(index)]

    @property
    def inputs(self) -> list[str]:
        return [logits_of(index) for index in self.asked] + [scalar_of(*scalar) for scalar in self.scalars]

    @property
    def outputs(self) -> list[str]:
        return [f"{part}_{index}" for index in self.asked for part in ("answer", "score", "leave")]

    def forward(self, *signals: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, signals, strict=True))
        state, outputs = self.policy.init_state(1, self.num_classes, "cpu"), []
        for index in self.asked:
            scalars = {name: named[scalar_of(name, index)] for name in self.policy.asks_at(index)}
            signal = ExitSignal(named[logits_of(index)], scalars)
            state, score, answer, leave = self.policy.step(state, signal, index)
            outputs += [answer.clone(), score.clone(), leave.clone()]  # a score may be the state itself
        return tuple(outputs)


def policy_graph(policy: ExitPolicy, num_classes: int) -> onnx.ModelProto:
    """Trace a policy for one row.

    Args:
        policy: with thresholds.
        num_classes: C.

    Returns:
        A graph from the exits' logits `[1, C]` and signals `[1]` to answer, score and decision of each exit looked at.

    Raises:
        PolicyError: for a policy whose `update` depends on values in Python, or uses what ONNX does not have.
    """
    fold = _Fold(policy, num_classes)
    example = tuple(torch.zeros(1, num_classes) for _ in fold.asked) + tuple(torch.zeros(1) for _ in fold.scalars)
    try:
        return export(fold, example, fold.inputs, fold.outputs, None)
    except Exception as error:  # the exporter raises many kinds
        first = str(error.__cause__ or error).strip().splitlines()[0]
        raise PolicyError(
            f"The {policy.name} policy cannot be exported ({first}). Its `update` must be tensor operations alone, without "
            "if, float() or item() on their values; or export forms=['layers'], where the policy runs in Python.",
            field="policy",
            value=policy.name,
        ) from error


def asked_exits(policy: ExitPolicy) -> list[tuple[int, str, str, str | None]]:
    """Exits where rows may leave: index, and the names of answer, score and decision in a whole that holds the policy."""
    last = policy.num_exits - 1
    open_exits = [index for index in range(last) if policy.wants(index) and policy.thresholds[index] is not None]
    names = [tuple(f"{PREFIX}{part}_{index}" for part in ("answer", "score", "leave")) for index in (*open_exits, last)]
    exits: list[tuple[int, str, str, str | None]] = [
        (index, answer, score, leave) for index, (answer, score, leave) in zip((*open_exits, last), names, strict=True)
    ]
    return [*exits[:-1], (*exits[-1][:3], None)]
