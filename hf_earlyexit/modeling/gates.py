"""What learns to say "leave here": a small network per exit, beside its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..registry import Registry

GATES: Registry[type[nn.Module]] = Registry("exit gate")
WIDTH = 32


@GATES.register("mlp")
class StateGate(nn.Module):
    """Two linear layers on the state that the exit head pools; the last exit needs none, since everybody leaves there.

    Args:
        hidden_size: H.
        num_labels: C.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882) calls it the policy network: H to 32, GELU, 32 to 1.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.inner = nn.Linear(self.input_size(hidden_size, num_labels), WIDTH)
        self.outer = nn.Linear(WIDTH, 1)

    @staticmethod
    def input_size(hidden_size: int, num_labels: int) -> int:
        """Numbers the gate looks at."""
        return hidden_size

    def look(self, state: Tensor, logits: Tensor | None) -> Tensor:
        """What the gate looks at, `[B, input_size]`."""
        return state

    def forward(self, state: Tensor, logits: Tensor | None) -> Tensor:
        """Leave logits `[B]` from the pooled state `[B, H]` and the exit's own logits `[B, C]`."""
        return self.outer(nn.functional.gelu(self.inner(self.look(state, logits)))).squeeze(-1)


@GATES.register("linear")
class LinearGate(nn.Module):
    """One linear layer on the state: the cheapest gate, for decoders, where it is asked at every token.

    Args:
        hidden_size: H.
        num_labels: C, which it does not look at.
    """

    def __init__(self, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.outer = nn.Linear(hidden_size, 1)

    def forward(self, state: Tensor, logits: Tensor | None) -> Tensor:
        """Leave logits `[B]` from the state `[B, H]`."""
        return self.outer(state).squeeze(-1)


@GATES.register("mlp+logits")
class LogitsGate(StateGate):
    """As "mlp", and it sees what the exit answers: its log-probabilities, without gradient into the head."""

    @staticmethod
    def input_size(hidden_size: int, num_labels: int) -> int:
        return hidden_size + num_labels

    def look(self, state: Tensor, logits: Tensor | None) -> Tensor:
        assert logits is not None  # captioners, whose exits may be asked without, refuse this kind
        answer = logits.detach()
        answer = answer.log_softmax(-1).clamp_min(-20) if answer.shape[-1] > 1 else answer
        return torch.cat([state, answer], -1)


def new_gates(config: Any, hidden_size: int, num_labels: int) -> nn.ModuleDict:
    """A gate for every exit but the last, by layer; none where the config asks for none."""
    if config.exit_gate is None:
        return nn.ModuleDict()
    gate = GATES.get(config.exit_gate)
    return nn.ModuleDict({str(layer): gate(hidden_size, num_labels) for layer in config.exit_layers[:-1]})
