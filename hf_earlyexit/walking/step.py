"""The inner step, written once: run to an exit, ask it, let the policy step, part who leaves from who stays.

Forward, the scheduler, token decoding, the walk of an export and the laws of policies all take this step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ..policies.base import ExitPolicy, ExitStep
from ..signals import ExitSignal, names_at
from ..transfer import Index, chosen

State = TypeVar("State")


class Walker(Protocol):
    """A model that can be walked: what the step needs to know of it. `Walks` brings `run`."""

    @property
    def exit_layers(self) -> tuple[int, ...]: ...

    def run_layer(self, layer: int, hidden: Tensor, context: Any) -> Tensor:
        """Hidden states after layer `layer` (1-based)."""

    def exit_signal(
        self, exit_index: int, hidden: Tensor, context: Any, asks: Sequence[str] = (), before: Tensor | None = None
    ) -> ExitSignal:
        """What exit `exit_index` (0-based) tells of the hidden states after its layer.

        Args:
            exit_index: of the exit.
            hidden, context: after its layer.
            asks: names of the signals that are wanted beside the logits; those that the exit gives.
            before: hidden states before the layer; needed where a signal reads them.
        """

    def run(
        self, layers: range, hidden: Tensor, context: Any, exit_index: int | None, asks: Sequence[str] = ()
    ) -> tuple[Tensor, ExitSignal | None]:
        """Hidden states after some layers (1-based), and what the exit there tells; `None` if none is asked."""


class Walks:
    """Gives a walker `run`, from its layers and exits."""

    def run(
        self: Any, layers: range, hidden: Tensor, context: Any, exit_index: int | None, asks: Sequence[str] = ()
    ) -> tuple[Tensor, ExitSignal | None]:
        """Hidden states after some layers (1-based), and what the exit there tells; `None` if none is asked."""
        before = hidden
        for layer in layers:
            before, hidden = hidden, self.run_layer(layer, hidden, context)
        return hidden, None if exit_index is None else self.exit_signal(exit_index, hidden, context, asks, before)


class Stay(Protocol):
    """Hidden states stand in memory that is lent to them: nobody else gets it as long as somebody refers to this."""

    def check(self) -> None:
        """Make sure that the states are still those of these rows, and have not gone on.

        Raises:
            RuntimeError: if they have.
        """


class Standing(NamedTuple):
    """B rows between two layers: hidden states, what the layers need beside them, and what the policy remembers.

    Where the hidden states stand in memory that is lent, `stay` tells; they are good as long as it is.
    """

    hidden: Tensor
    context: Any
    state: Any
    stay: Stay | None = None

    def keep(self, rows: Sequence[int], index: Index) -> Standing:
        """Some of the rows, in every part.

        Args:
            rows: their positions, at least one.
            index: the same positions, on the device, as `index_of` gives them.
        """
        hidden, context = self.context.take(self.hidden, rows, index)
        some = Standing(hidden, context, rows_of(self.state, index), self.stay)
        if isinstance(index, slice) and index.start == 0:
            return some  # the front of a memory may go on there; others must not write on what is behind it
        return some.on_their_own()

    def on_their_own(self) -> Standing:
        """The same in memory of their own, so that what is lent can be given to others."""
        if self.stay is None:
            return self
        self.stay.check()
        return self._replace(hidden=self.hidden.clone(), stay=None)


class Moved(NamedTuple):
    """How a device has put B rows in another order: where each was `[B]`, and their bounds in the new one `[B + 1]`."""

    rows: Tensor
    bounds: Tensor


class Parted(NamedTuple):
    """Positions of the rows that leave, and of those that stay."""

    leaving: list[int]
    staying: list[int]


def stretches(walker: Walker, wanted: Callable[[int], bool]) -> Iterator[tuple[range, int]]:
    """The layers (1-based) up to each exit that is wanted, and that exit (0-based)."""
    passed = 0
    for index, layer in enumerate(walker.exit_layers):
        if wanted(index):
            yield range(passed + 1, layer + 1), index
            passed = layer


def step_to_exit(
    walker: Walker, layers: range, rows: Standing, policy: ExitPolicy | None, exit_index: int | None
) -> tuple[Standing, ExitStep | None]:
    """Run layers, ask the exit behind them, and let the policy step. Looks at no value, so it waits for no device.

    Args:
        walker: the model.
        layers: to run, 1-based.
        rows: before the first of them.
        policy: says who leaves; `None` lets nobody go, its scores are nan.
        exit_index: of the exit after the last layer; `None` where none is asked.

    Returns:
        The rows behind the layers, all of them, and the outcome of the exit; `None` if none was asked.
    """
    asks = () if policy is None or exit_index is None else policy.asks_at(exit_index)
    hidden, signal = walker.run(layers, rows.hidden, rows.context, exit_index, asks)
    if signal is None or exit_index is None:
        return rows._replace(hidden=hidden, stay=None), None
    if policy is None:
        score = torch.full(signal.logits.shape[:1], torch.nan, device=signal.logits.device)
        return rows._replace(hidden=hidden, stay=None), ExitStep(
            rows.state, score, signal.logits, torch.zeros_like(score).bool()
        )
    outcome = policy.step(rows.state, signal, exit_index)
    return Standing(hidden, rows.context, outcome.state), outcome


def parted(leave: Sequence[bool]) -> Parted:
    """Who leaves and who stays, from what was decided of each row."""
    return Parted(*([row for row, leaves in enumerate(leave) if leaves == wanted] for wanted in (True, False)))


def rows_of(state: State, index: Index) -> State:
    """What a policy remembers of some rows; nothing of nothing."""
    return state if state is None else type(state)(*(chosen(part, index) for part in state))  # type: ignore[attr-defined]


def joined_rows(states: Sequence[State]) -> State:
    """What a policy remembers of several batches, as of one; nothing of nothing."""
    first = states[0]
    return first if first is None else type(first)(*map(torch.cat, zip(*states, strict=True)))


def every_exit(
    walker: Walker, hidden: Tensor, context: Any, asks: Sequence[str] = ()
) -> Iterator[tuple[int, Tensor, int | None, ExitSignal | None]]:
    """Run every layer and ask every exit.

    Args:
        walker: the model.
        hidden, context: before the first layer.
        asks: names of the signals that are wanted beside the logits.

    Yields:
        Each layer (1-based), hidden states after it, the exit there (0-based) and what it tells; `None` where there is none.
    """
    exit_at, last = {layer: index for index, layer in enumerate(walker.exit_layers)}, walker.exit_layers[-1]
    for layer in range(1, last + 1):
        index = exit_at.get(layer)
        hidden, signal = walker.run(range(layer, layer + 1), hidden, context, index, names_at(asks, last=layer == last))
        yield layer, hidden, index, signal
