"""What gates learn from when the network is held still: every exit's pooled state and answer, collected once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import ConsistentObjective
from ..modeling.protocol import TorchExitModel
from ..serving.collect import full_pass, labelled_rows, make_trace
from ..serving.reader import reader_for
from ..trace import ExitTrace
from .gate_report import gate_metrics, token_gate_metrics
from .outcomes import Outcomes


@dataclass(frozen=True, kw_only=True, eq=False)
class GateStates:
    """Rows as the gates see them.

    Args:
        states: pooled state of every exit but the last `[N, E - 1, H]`, float32 on the CPU: `4 (E - 1) H` bytes a row.
        trace: the same rows' logits and labels.
    """

    states: Tensor
    trace: ExitTrace

    @cached_property
    def outcomes(self) -> Outcomes:
        """How every exit fares on them."""
        return Outcomes.of(self.trace)

    def answers(self, rows: Tensor) -> Tensor:
        """Logits of the early exits on some of them, `[R, E - 1, C]`, float32."""
        return self.trace.logits[rows, :-1].float()

    def gate_logits(self, gates: nn.ModuleDict) -> Tensor:
        """Leave logits `[N, E - 1]`, float32."""
        return _gate_logits(gates, self.states, self.trace.logits)

    def judged(self, gates: nn.ModuleDict) -> ExitTrace:
        """The trace with what these gates say."""
        return replace(self.trace, scalars={"gate": self.gate_logits(gates)})

    def metrics(self, gates: nn.ModuleDict, objective: ConsistentObjective, measure: str) -> dict[str, float]:
        """What they would do with these gates: see `gate_metrics`."""
        return gate_metrics(self.judged(gates), objective, measure)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStates:
    """Tokens of texts as the gates see them; gates of models that write do not look at answers.

    Args:
        states: at every exit but the last, as gates look at them `[N, E - 1, H]`, float32 on the CPU: `4 (E - 1) H` bytes a
            token.
        outcomes: how every exit fares on the same tokens.
    """

    states: Tensor
    outcomes: Outcomes

    def answers(self, tokens: Tensor) -> Tensor:
        """Nothing, `[R, E - 1, 0]`."""
        return self.states.new_zeros(len(tokens), self.states.shape[1], 0)

    def gate_logits(self, gates: nn.ModuleDict) -> Tensor:
        """Leave logits `[N, E - 1]`, float32."""
        return _gate_logits(gates, self.states, self.states[..., :0])

    def metrics(self, gates: nn.ModuleDict, objective: ConsistentObjective, measure: str) -> dict[str, float]:
        """What they would do with these gates: see `token_gate_metrics`."""
        return token_gate_metrics(self.gate_logits(gates), self.outcomes, objective, measure)


def _gate_logits(gates: nn.ModuleDict, states: Tensor, logits: Tensor) -> Tensor:
    """Leave logits `[N, E - 1]`, float32, from states `[N, E - 1, H]` and logits `[N, E - 1 or more, C]`."""
    modules = list(gates.values())
    if not modules:
        return states.new_zeros(len(states), 0)
    weight = next(modules[0].parameters())
    with torch.inference_mode():
        columns = [
            gate(states[:, index].to(weight), logits[:, index].to(weight)).float().cpu()
            for index, gate in enumerate(modules)
        ]
    return torch.stack(columns, 1)


def collect_states(
    model: TorchExitModel,
    rows: Any,
    *,
    tokenizer: Any = None,
    image_processor: Any = None,
    split: str = "train",
    max_batch_tokens: int = 4096,
    max_length: int | None = None,
    progress: bool = True,
) -> GateStates:
    """Run every exit on every row once and keep pooled states, logits and labels, in the order of the rows.

    Args:
        model: a model with exits.
        rows, tokenizer, image_processor, split, max_batch_tokens, max_length, progress: as in `collect_trace`.
    """
    encoded, labels = labelled_rows(model, rows, reader_for(model, tokenizer, max_length, image_processor), None)
    states, logits, order = [], [], []
    with pooled_states(model) as pooled:
        for indices, output in full_pass(model, encoded, max_batch_tokens, progress):
            states.append(torch.stack(pooled, 1) if pooled else torch.zeros(len(indices), 0, 0))
            pooled.clear()
            logits.append(output.exit_logits.float().cpu())
            order += indices
    back = torch.tensor(order).argsort()
    return GateStates(states=torch.cat(states)[back], trace=make_trace(model, torch.cat(logits)[back], labels, split))


@contextmanager
def pooled_states(model: TorchExitModel) -> Iterator[list[Tensor]]:
    """A list that fills with what each exit head is given, in the order of the exits."""
    seen: list[Tensor] = []
    hooks = [
        head.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float().cpu()))
        for head in model.exit_heads.values()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
