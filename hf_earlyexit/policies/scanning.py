"""A policy folded over the exits of a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..signals import ExitSignal, SignalSource

SCANNED = 4096  # rows at a time, so that what is made of them stays small
OfLogits = Callable[[Tensor], tuple[Tensor, ...]]  # of `[N, C]`, values `[N]`


class LearningRows(SignalSource, Protocol):
    """Labelled rows that a policy learns its own numbers from: an `ExitTrace`, or what stands in for one."""

    @property
    def num_rows(self) -> int:
        """N."""

    @property
    def problem_type(self) -> str:
        """What the labels mean."""

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Layers (1-based) of all exits."""

    @property
    def costs(self) -> tuple[float, ...]:
        """Cost of leaving at each exit, in layers."""

    @property
    def scalars(self) -> Container[str]:
        """Holds the names of the signals that there are beside the logits."""

    @property
    def quality(self) -> Tensor:
        """Quality of each exit on each row, `[N, E]`."""

    @property
    def logits(self) -> Tensor:
        """`[N, E, C]`."""

    @property
    def labels(self) -> Tensor:
        """`[N]` class numbers, or `[N, C]`."""

    def select(self, rows: Tensor | Sequence[int]) -> LearningRows:
        """Some of the rows, in the given order."""

    def row_values(self, of_logits: OfLogits, exit_index: int) -> tuple[Tensor, ...]:
        """What a function makes of each row's logits at an exit; it looks at every row by itself."""


class Scan(NamedTuple):
    """A policy folded over a trace: scores `[N, E]` (float32, -inf at muted exits) and answers `[N, E, C]`."""

    scores: Tensor
    answers: Tensor


def scan(policy: Any, trace: SignalSource) -> Scan:
    """See `ExitPolicy.scan`; answers are the trace's own logits, not copied, where the policy gives no others."""
    signals = [trace.signal(exit_index) for exit_index in range(trace.num_exits)]
    shape = len(signals[0].logits), len(signals)
    scores: Tensor | None = None  # filled in place: parts that are kept would leave holes that fit nothing
    answers: Tensor | None = None
    state = None
    for part, exit_index, here, is_first in parts_in_turn(policy, signals):
        if is_first:
            state = policy.init_state(*here.logits.shape, here.logits.device)
        state, score, answer = policy.update(state, here, exit_index)
        if scores is None:
            scores = score.new_full(shape, -math.inf)
        scores[part, exit_index] = score
        if answer is not here.logits:
            if answers is None:
                every = torch.stack([signal.logits for signal in signals], 1)
                answers = every.to(torch.promote_types(every.dtype, answer.dtype))
            answers[part, exit_index] = answer
    assert scores is not None  # the last exit is never muted
    return Scan(scores, own_answers(trace) if answers is None else answers)


def slices(count: int) -> Iterator[slice]:
    """Rows that are scanned together; of no rows an empty slice, which tells shapes and dtypes."""
    for first in range(0, max(count, 1), SCANNED):
        yield slice(first, first + SCANNED)


def parts_in_turn(policy: Any, signals: Sequence[ExitSignal]) -> Iterator[tuple[slice, int, ExitSignal, bool]]:
    """Rows that are scanned together, exit by exit.

    Args:
        policy: whose muted exits are left out.
        signals: what every exit tells of all rows.

    Yields:
        The rows, the exit, what it tells about them, and whether it is the first that they come to. Their logits are side by
        side: once, for all that a policy does with them.
    """
    kept = [exit_index for exit_index in range(len(signals)) if exit_index not in policy.muted]
    for part in slices(len(signals[0].logits)):
        for exit_index in kept:
            logits, scalars = signals[exit_index]
            here = ExitSignal(logits[part].contiguous(), {name: values[part] for name, values in scalars.items()})
            yield part, exit_index, here, exit_index == kept[0]


def values_by_parts(of_logits: OfLogits, logits: Tensor) -> tuple[Tensor, ...]:
    """What a function makes of the logits of all rows at an exit, so many at a time that they stay in the cache."""
    parts = [of_logits(logits[part].contiguous()) for part in slices(len(logits))]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def own_answers(trace: SignalSource) -> Tensor:
    """Each exit's own answer `[N, E, C]`, not copied where the trace has them in one piece."""
    logits: Tensor | None = getattr(trace, "logits", None)
    if logits is None:
        return torch.stack([trace.signal(exit_index).logits for exit_index in range(trace.num_exits)], 1)
    return logits
