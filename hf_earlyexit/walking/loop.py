"""The loop: run a layer, ask the exit, let the decided rows go, carry on with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..families.context import Context
from ..policies.base import ExitPolicy
from ..signals import ExitSignal, names_at


class Walker(Protocol):
    """A model that can be walked: what the loop needs to know of it."""

    @property
    def exit_layers(self) -> tuple[int, ...]: ...

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Context, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells of the hidden states after its layer.

        Args:
            exit_index: of the exit.
            hidden, context: after its layer.
            asks: names of the signals that are wanted beside the logits; those that the exit gives.
            before: hidden states before the layer; needed where a signal reads them.
        """


class Early(NamedTuple):
    """Early answers `[B, C]`, the exit index each row left at `[B]`, and the score it left with `[B]`."""

    logits: Tensor
    exit_index: Tensor
    score: Tensor


def run_early(walker: Walker, hidden: Tensor, context: Context, policy: ExitPolicy, num_classes: int) -> Early:
    """Run until every row is decided; decided rows are dropped from hidden states, masks and policy state.

    Args:
        walker: the model.
        hidden, context: before the first layer.
        policy: says who leaves.
        num_classes: C.

    Returns:
        Answers in the order the rows came.
    """
    batch, device = context.count(hidden), hidden.device
    result = Early(
        hidden.new_zeros(batch, num_classes),
        torch.zeros(batch, dtype=torch.long, device=device),
        torch.zeros(batch, device=device),
    )
    state = policy.init_state(batch, num_classes, device)
    rows = torch.arange(batch, device=device)
    exit_at = {layer: index for index, layer in enumerate(walker.exit_layers)}
    for layer in range(1, walker.exit_layers[-1] + 1):
        if not len(rows):
            break
        before, hidden = hidden, walker.run_layer(layer, hidden, context)
        index = exit_at.get(layer)
        if index is None or not policy.wants(index):
            continue
        signal = walker.exit_signal(index, hidden, context, policy.asks_at(index), before)
        state, score, answer, leave = policy.step(state, signal, index)
        decided = leave.tolist()  # the one wait for the device
        if not any(decided):
            continue
        _write(result, rows, leave, answer, score, index)
        staying = [row for row, left in enumerate(decided) if not left]
        keep = torch.tensor(staying, dtype=torch.long, device=device)
        rows, state = rows[keep], type(state)(*(part[keep] for part in state))
        if staying:
            hidden, context = context.take(hidden, staying, keep)
    return result


def _write(result: Early, rows: Tensor, leave: Tensor, answer: Tensor, score: Tensor, index: int) -> None:
    leaving = rows[leave]
    result.logits[leaving] = answer[leave].to(result.logits.dtype)
    result.exit_index[leaving] = index
    result.score[leaving] = score[leave]


def run_all(
    walker: Walker,
    hidden: Tensor,
    context: Context,
    num_classes: int,
    asks: Sequence[str] = (),
    states: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run every layer and every exit.

    Args:
        walker: the model.
        hidden, context: before the first layer.
        num_classes: C.
        asks: names of the signals that are wanted beside the logits.
        states: gets the hidden states after every layer.

    Returns:
        Logits of all exits `[B, E, C]`, and the signals by name: `[B, E]`, or `[B, E - 1]` of those that the last exit does
        not give.
    """
    exits = len(walker.exit_layers)
    if not context.count(hidden):  # stock attention cannot reshape an empty batch
        given = {name: exits if name in names_at(asks, last=True) else exits - 1 for name in asks}
        empty = {name: hidden.new_zeros(0, count) for name, count in given.items()}
        return hidden.new_zeros(0, exits, num_classes), empty
    logits: list[Tensor] = []
    scalars: dict[str, list[Tensor]] = {name: [] for name in asks}
    exit_at = {layer: index for index, layer in enumerate(walker.exit_layers)}
    for layer in range(1, walker.exit_layers[-1] + 1):
        before, hidden = hidden, walker.run_layer(layer, hidden, context)
        if states is not None:
            states.append(hidden)
        index = exit_at.get(layer)
        if index is not None:
            signal = walker.exit_signal(index, hidden, context, names_at(asks, last=index == exits - 1), before)
            logits.append(signal.logits)
            for name, values in signal.scalars.items():
                scalars[name].append(values)
    together = {
        name: torch.stack(values, 1) if values else logits[0].new_zeros(len(logits[0]), 0)
        for name, values in scalars.items()
    }
    return torch.stack(logits, 1), together
