"""The loop: from exit to exit until every row is decided, or through all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import DataError
from ..policies.base import ExitPolicy, ExitStep
from ..signals import names_at
from .step import Standing, Walker, every_exit, parted, step_to_exit, stretches

if TYPE_CHECKING:
    from ..families.context import Context


class Early(NamedTuple):
    """Early answers `[B, C]`, the exit index each row left at `[B]`, the score it left with `[B]`, and the full model's
    answers to the shadowed rows `[n, C]`."""

    logits: Tensor
    exit_index: Tensor
    score: Tensor
    full_logits: Tensor


def run_early(
    walker: Walker,
    hidden: Tensor,
    context: Any,
    policy: ExitPolicy,
    num_classes: int,
    shadowed: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> Early:
    """Run until every row is decided; decided rows are dropped from hidden states, masks and policy state.

    Args:
        walker: the model.
        hidden, context: before the first layer; the context as `families.Context`.
        policy: says who leaves.
        num_classes: C.
        shadowed: positions of n rows that, once decided, run on to the last layer by themselves.
        dtype: of the answers; that of the hidden states by default.

    Returns:
        Answers in the order the rows came, and of the shadowed rows in that of `shadowed`.

    Raises:
        DataError: for a shadowed row that is not there, or is named twice.
    """
    batch, device = context.count(hidden), hidden.device
    result = Early(
        hidden.new_zeros(batch, num_classes, dtype=dtype),
        torch.full((batch,), -1, device=device),
        torch.zeros(batch, device=device),
        hidden.new_zeros(len(shadowed), num_classes, dtype=dtype),
    )
    number_of = {row: number for number, row in enumerate(shadowed)}
    if len(number_of) < len(shadowed) or any(not 0 <= row < batch for row in number_of):
        raise DataError(
            f"shadowed is {list(shadowed)}; expected different positions of the {batch} rows, from 0.", field="shadowed"
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
        if number_of:
            numbers = {row: number_of[place] for row in leaving if (place := int(places[row])) in number_of}
            _run_on(walker, rows, index, numbers, result.full_logits)
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


def _run_on(walker: Walker, rows: Standing, exit_index: int, numbers: Mapping[int, int], full_logits: Tensor) -> None:
    """Write down what the last exit says of some of the rows that stand at an exit: their positions, with their numbers."""
    if not numbers:
        return
    last, keep = len(walker.exit_layers) - 1, list(numbers)
    followed = rows.keep(keep, torch.tensor(keep, device=full_logits.device))
    layers = range(walker.exit_layers[exit_index] + 1, walker.exit_layers[last] + 1)
    _, signal = walker.run(layers, followed.hidden, followed.context, last)
    assert signal is not None  # an exit was asked
    full_logits[list(numbers.values())] = signal.logits.to(full_logits.dtype)


def run_all(
    walker: Walker,
    hidden: Tensor,
    context: Context,
    num_classes: int,
    asks: Sequence[str] = (),
    states: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run every layer and every exit.

    Args:
        walker: the model.
        hidden, context: before the first layer.
        num_classes: C.
        asks: names of the signals that are wanted beside the logits.
        states: gets the hidden states after every layer.
        dtype: of the answers to no rows; that of the hidden states by default.

    Returns:
        Logits of all exits `[B, E, C]`, and the signals by name: `[B, E]`, or `[B, E - 1]` of those that the last exit does
        not give.
    """
    exits = len(walker.exit_layers)
    if not context.count(hidden):  # stock attention cannot reshape an empty batch
        given = {name: exits if name in names_at(asks, last=True) else exits - 1 for name in asks}
        empty = {name: hidden.new_zeros(0, count, dtype=dtype) for name, count in given.items()}
        return hidden.new_zeros(0, exits, num_classes, dtype=dtype), empty
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
