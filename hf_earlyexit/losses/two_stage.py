"""Exits are added to a model whose own answers stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..citations import DEEBERT
from ..errors import TrainingError
from .base import OBJECTIVES
from .distillation import DistillationObjective


@OBJECTIVES.register("two-stage")
@dataclass(frozen=True, kw_only=True)
class TwoStageObjective(DistillationObjective):
    """Only the exit heads learn; backbone and last head are frozen, without dropout, and keep their answers to the bit.

    Use it on a classifier that is already fine-tuned. `strength` above 0 adds distillation from the last exit.

    Paper: DeeBERT (https://aclanthology.org/2020.acl-main.204): a plain sum over the early exits.
    """

    weights: str | Sequence[float] = "uniform"
    strength: float = 0.0

    freezes_backbone: ClassVar[bool] = True
    citation: ClassVar[tuple[str, ...]] = (DEEBERT,)

    def exit_weights(self, exit_layers: Sequence[int]) -> Tensor:
        weights = super().exit_weights(exit_layers)
        if len(weights) == 1:
            return weights
        early = torch.cat([weights[:-1], weights.new_zeros(1)])  # the last exit cannot learn
        if not float(early.sum()) > 0:
            raise TrainingError(
                f"weights is {self.weights!r}; the last exit is frozen here, so an earlier one must weigh more than 0.",
                field="weights",
                value=self.weights,
            )
        return early / early.sum()
