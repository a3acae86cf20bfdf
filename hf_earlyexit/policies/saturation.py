"""Leave where a layer no longer changes the state: the rule that needs no head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..citations import CALM, MUE
from ..signals import ExitSignal
from .base import register_policy
from .memoryless import MemorylessPolicy, NoState


@register_policy("saturation")
@dataclass(frozen=True, kw_only=True)
class SaturationPolicy(MemorylessPolicy):
    """Leave where the cosine of the states before and after a layer reaches the threshold, in `[0, 1]`.

    Made for decoders, where asking the vocabulary at every layer costs more than it saves. Cosines below 0 score 0.

    Paper: MuE (https://arxiv.org/abs/2211.11152), and the hidden-state measure of CALM (https://arxiv.org/abs/2207.07061).
    """

    citation: ClassVar[tuple[str, ...]] = (MUE, CALM)
    asks: ClassVar[tuple[str, ...]] = ("similarity",)

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        return state, signal.scalar("similarity").clamp_min(0), signal.logits
