"""Leave where a layer no longer changes the state: the rule that needs no head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..citations import CALM, MUE
from ..errors import PolicyError
from .base import ExitSignal, register_policy
from .memoryless import MemorylessPolicy, NoState


@register_policy("saturation")
@dataclass(frozen=True, kw_only=True)
class SaturationPolicy(MemorylessPolicy):
    """Leave where the cosine of the states before and after a layer reaches the threshold, in `[0, 1]`.

    For decoders, where asking the vocabulary at every layer costs more than it saves. Cosines below 0 score 0.

    Paper: MuE (https://arxiv.org/abs/2211.11152), and the hidden-state measure of CALM (https://arxiv.org/abs/2207.07061).
    """

    citation: ClassVar[tuple[str, ...]] = (MUE, CALM)
    uses_logits: ClassVar[bool] = False
    uses_similarity: ClassVar[bool] = True

    def update(self, state: NoState, signal: ExitSignal, exit_index: int) -> tuple[NoState, Tensor, Tensor]:
        _require_similarity(signal.similarity)
        return state, signal.similarity.float().clamp_min(0), signal.logits  # type: ignore[union-attr]

    @classmethod
    def learn(cls, trace: Any, **options: Any) -> dict[str, Any]:
        """Nothing to learn; refuses a trace without similarities before anything is computed.

        Raises:
            PolicyError: for a trace of a classifier, whose exits report none.
        """
        _require_similarity(getattr(trace, "similarities", None))
        return options


def _require_similarity(similarity: Tensor | None) -> None:
    if similarity is None:
        raise PolicyError(
            "The saturation policy compares the states before and after a layer, and these exits do not report it: only "
            "captioners do. Use confidence, margin or beem for a classifier.",
            field="similarity",
        )
