"""The loop: from exit to exit until every row is decided, or through all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..policies.base import ExitPolicy, ExitStep
from ..signals import names_at
from .step import Standing, Walker, every_exit, parted, step_to_exit, stretches

if TYPE_CHECKING:
    from ..families.context import Context


class Early(NamedTuple):
    """Early answers `[B, C]`, the exit index each row left at `[B]`, and the score it left with `[B]`."""

    logits: Tensor
    exit_index: Tensor
    score: Tensor


def run_early(walker: Walker, hidden: Tensor, context: Any, policy: ExitPolicy, num_classes: int) -> Early:
    """Run until every row is decided; decided rows are dropped from hidden states, masks and policy state.

    Args:
        walker: the model.
        hidden, context: before the first layer; the context as `families.Context`.
        policy: says who leaves.
        num_classes: C.

    Returns:
        Answers in the order the rows came.
    """
    batch, device = context.count(hidden), hidden.device
    result = Early(
        hidden.new_zeros(batch, num_classes),
        torch.full((batch,), -1, device=device),
        torch.zeros(batch, device=device),
    )
    if not batch:
        return result
    places = torch.arange(batch, device=device)
    rows = Standing(hidden, context, policy.init_state(batch, num_classes, device))
    for layers, index in stretches(walker, policy.wants):
        rows, outcome = step_to_exit(walker, layers, rows, policy, index)
        assert outcome is not None  # an exit was asked
        leaving, staying = parted(outcome.leave.tolist())  # the one wait for the device
        if not leaving:
            continue
        _write(result, places, outcome, index)
        if not staying:
            break
        keep = torch.tensor(staying, dtype=torch.long, device=device)
        places, rows = places[keep], rows.keep(staying, keep)
    return result


def _write(result: Early, places: Tensor, outcome: ExitStep, index: int) -> None:
    leaving = places[outcome.leave]
    result.logits[leaving] = outcome.answer[outcome.leave].to(result.logits.dtype)
    result.exit_index[leaving] = index
    result.score[leaving] = outcome.score[outcome.leave]


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
    for _, after, _, signal in every_exit(walker, hidden, context, asks):
        if states is not None:
            states.append(after)
        if signal is not None:
            logits.append(signal.logits)
            for name, values in signal.scalars.items():
                scalars[name].append(values)
    none = logits[0].new_zeros(len(logits[0]), 0)
    return torch.stack(logits, 1), {name: torch.stack(parts, 1) if parts else none for name, parts in scalars.items()}
