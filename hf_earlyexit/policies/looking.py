"""Rules in two steps, what they see of a row and what they make of it, so that many of them look at the same rows once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..signals import ExitSignal, SignalSource
from .base import ExitPolicy
from .scanning import OfLogits, Scan, own_answers, parts_in_turn, slices

Seen = tuple[Tensor, ...]  # what a rule sees at one exit, one number a row in each


class LookingPolicy(ExitPolicy):
    """A rule whose learned numbers have no say in what it sees of a row; its answers are the exits' own.

    `look` and `judge` share a state, but neither reads what the other writes there.
    """

    learned: ClassVar[tuple[str, ...]]  # the fields that `look` does not read
    of_logits: ClassVar[OfLogits | None] = None  # what `look` sees, where that is of the exit's own logits alone

    @abstractmethod
    def look(self, state: Any, signal: ExitSignal, exit_index: int) -> tuple[Any, Seen]:
        """The next state, and what the rule sees of each row, `[B]` each; arguments as for `update`."""

    @abstractmethod
    def judge(self, state: Any, seen: Seen, exit_index: int) -> tuple[Any, Tensor]:
        """The next state, and the score `[B]`, from what `look` saw at this exit."""

    def update(self, state: Any, signal: ExitSignal, exit_index: int) -> tuple[Any, Tensor, Tensor]:
        state, seen = self.look(state, signal, exit_index)
        state, score = self.judge(state, seen, exit_index)
        return state, score, signal.logits

    def scan(self, trace: SignalSource) -> Scan:
        return Looks.of(self, trace).scan(self)

    @property
    def sight(self) -> tuple[Any, ...]:
        """All that `look` depends on beside the rows: policies of one sight see the same."""
        return self.all_but("thresholds", *self.learned)


class Looks(NamedTuple):
    """What policies of one sight see of the rows of a trace.

    Attributes:
        sight: of the policies.
        seen: at each exit, `[N]` each; nothing at muted exits.
        trace: the rows.
    """

    sight: tuple[Any, ...]
    seen: list[Seen]
    trace: SignalSource

    @classmethod
    def of(cls, policy: LookingPolicy, trace: SignalSource, row_values: Callable[..., Seen] | None = None) -> Looks:
        """Let a policy look at all rows of a trace.

        Args:
            policy: whatever its learned numbers are.
            trace: the rows.
            row_values: as `LearningRows.row_values`, where they may be known already.
        """
        signals = [trace.signal(exit_index) for exit_index in range(trace.num_exits)]
        of_logits, muted = type(policy).of_logits, policy.muted
        if of_logits is not None and row_values is not None:
            return cls(
                policy.sight,
                [() if index in muted else row_values(of_logits, index) for index in range(len(signals))],
                trace,
            )
        kept: list[Seen] = [()] * len(signals)
        state = None
        for part, exit_index, here, is_first in parts_in_turn(policy, signals):
            if is_first:
                state = policy.init_state(len(here.logits), here.logits.shape[1], here.logits.device)
            state, seen = policy.look(state, here, exit_index)
            if not kept[exit_index]:
                kept[exit_index] = tuple(values.new_empty(len(signals[0].logits)) for values in seen)
            for whole, values in zip(kept[exit_index], seen, strict=True):
                whole[part] = values
        return cls(policy.sight, kept, trace)

    def scan(self, policy: LookingPolicy) -> Scan:
        """What `policy.scan` makes of the rows, for a policy of this sight."""
        last = self.trace.signal(self.trace.num_exits - 1).logits
        scores = torch.full((len(last), len(self.seen)), -math.inf, device=last.device)
        for part in slices(len(last)):
            state = policy.init_state(len(last[part]), last.shape[1], last.device)
            for exit_index, seen in enumerate(self.seen):
                if seen:
                    state, scores[part, exit_index] = policy.judge(state, tuple(values[part] for values in seen), exit_index)
        return Scan(scores, own_answers(self.trace))
