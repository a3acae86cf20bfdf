"""Rules that look at one exit at a time: maximum probability, entropy, margin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..citations import DEEBERT
from ..problem_types import MULTI_LABEL, SINGLE_LABEL
from ..signals import ExitSignal
from .base import register_policy
from .measures import certainty, margin, max_probability, measure
from .memoryless import MemorylessPolicy, NoState


class MeasuredPolicy(MemorylessPolicy):
    """A row leaves where a measure of this exit's own output reaches the threshold."""

    problem_types: ClassVar[frozenset[str]] = frozenset({SINGLE_LABEL, MULTI_LABEL})
    how: ClassVar[Callable[[Tensor], Tensor]]

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        return state, measure(signal.logits, type(self).how, self.problem_type), signal.logits


@register_policy("confidence")
@dataclass(frozen=True, kw_only=True)
class ConfidencePolicy(MeasuredPolicy):
    """Leave where the largest probability reaches the threshold, in `[0, 1]`.

    The plainest rule, and on many models the one to beat.
    """

    how: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(max_probability)


@register_policy("entropy")
@dataclass(frozen=True, kw_only=True)
class EntropyPolicy(MeasuredPolicy):
    """Leave where one minus the normalised entropy reaches the threshold, in `[0, 1]`.

    Paper: DeeBERT (https://aclanthology.org/2020.acl-main.204) leaves where the entropy falls below a threshold in nats;
    threshold t here is entropy (1 - t) * log C there.
    """

    citation: ClassVar[tuple[str, ...]] = (DEEBERT,)
    how: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(certainty)


@register_policy("margin")
@dataclass(frozen=True, kw_only=True)
class MarginPolicy(MeasuredPolicy):
    """Leave where the gap between the two largest probabilities reaches the threshold, in `[0, 1]`."""

    how: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(margin)
