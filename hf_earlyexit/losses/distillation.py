"""Exits learn the labels and the last exit's answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..citations import BEEM
from ..errors import TrainingError
from ..problem_types import MULTI_LABEL, REGRESSION
from ..values import check_choice, check_real
from .base import OBJECTIVES, LabelLosses, Objective, label_losses

DIRECTIONS = ("exit-to-last", "last-to-exit")


@OBJECTIVES.register("distillation")
@dataclass(frozen=True, kw_only=True)
class DistillationObjective(Objective):
    """Label loss plus a divergence from the last exit, whose answer is taken as given (no gradient flows into it).

    Args:
        temperature: softens both distributions, above 0; the divergence is multiplied by its square.
        direction: "exit-to-last" is KL(exit || last), "last-to-exit" KL(last || exit).
        strength: factor of the divergence, at or above 0.

    Paper: BEEM (https://arxiv.org/abs/2502.00745): cross entropy plus KL, temperature 1. The paper's direction could not be
    established, so both are here.
    """

    citation: ClassVar[tuple[str, ...]] = (BEEM,)

    temperature: float = 1.0
    direction: str = "exit-to-last"
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(1e-3, error=TrainingError, temperature=self.temperature)
        check_real(0, error=TrainingError, strength=self.strength)
        check_choice(DIRECTIONS, error=TrainingError, direction=self.direction)

    def exit_losses(
        self, exit_logits: Tensor, labels: Tensor, problem_type: str, label_losses: LabelLosses = label_losses
    ) -> Tensor:
        teacher = exit_logits[:, -1:].detach()
        return label_losses(exit_logits, labels, problem_type) + self.strength * self.divergence(
            exit_logits, teacher, problem_type
        )

    def divergence(self, exit_logits: Tensor, teacher: Tensor, problem_type: str) -> Tensor:
        """Mean divergence of each exit `[B, E, C]` from the teacher `[B, 1, C]`, `[E]`; exactly 0 for the last exit."""
        if problem_type == REGRESSION:
            apart = (exit_logits - teacher).square().mean(-1)
        else:
            student, master = (log_probabilities(x / self.temperature, problem_type) for x in (exit_logits, teacher))
            first, second = (student, master) if self.direction == "exit-to-last" else (master, student)
            apart = (first.exp() * (first - second)).flatten(2).sum(-1) * self.temperature**2
        early = torch.arange(exit_logits.shape[1], device=apart.device) < exit_logits.shape[1] - 1
        return apart.mean(0) * early


def log_probabilities(logits: Tensor, problem_type: str) -> Tensor:
    """Log-probabilities over classes `[..., C]`, or over yes and no of each label `[..., C, 2]`."""
    if problem_type == MULTI_LABEL:
        return torch.stack([logits, torch.zeros_like(logits)], -1).log_softmax(-1)
    return logits.log_softmax(-1)
