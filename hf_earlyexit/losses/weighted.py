"""Every exit learns the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..citations import PABEE
from .base import OBJECTIVES, LabelLosses, Objective, label_losses


@OBJECTIVES.register("weighted")
@dataclass(frozen=True, kw_only=True)
class WeightedObjective(Objective):
    """A weighted mean of the exits' label losses; all weights of the network are trained together.

    Paper: PABEE (https://arxiv.org/abs/2006.04152) and BEEM weigh an exit by its depth ("linear").
    """

    citation: ClassVar[tuple[str, ...]] = (PABEE,)

    def exit_losses(
        self, exit_logits: Tensor, labels: Tensor, problem_type: str, label_losses: LabelLosses = label_losses
    ) -> Tensor:
        return label_losses(exit_logits, labels, problem_type)
