"""Leave when enough exits in a row have said the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..citations import PABEE
from ..errors import PolicyError
from ..problem_types import REGRESSION, predictions
from ..signals import ExitSignal
from ..values import check_real
from .agreement import Chain
from .base import ExitPolicy, register_policy


@register_policy("patience")
@dataclass(frozen=True, kw_only=True)
class PatiencePolicy(ExitPolicy):
    """Leave when the prediction has stayed the same for `threshold` exits after the first.

    The score counts agreements with the exit before; it is back at 0 after a change of mind.

    Args:
        tolerance: for regression, the largest change between two exits that counts as agreement, in label units.

    Paper: PABEE (https://arxiv.org/abs/2006.04152). The released code takes agreement over the whole batch and so needs
    batches of one row; here every row counts for itself.
    """

    tolerance: float = 0.0

    citation: ClassVar[tuple[str, ...]] = (PABEE,)
    counts: ClassVar[bool] = True
    lowest_threshold: ClassVar[float] = 1.0

    @property
    def highest_threshold(self) -> float:
        return float(max(len(self.thresholds), 1))

    def validate(self) -> None:
        super().validate()
        check_real(0, error=PolicyError, tolerance=self.tolerance)
        if self.problem_type == REGRESSION and self.tolerance == 0:
            raise PolicyError(
                "patience on regression needs a tolerance above 0: the change between two exits that counts as agreement.",
                field="tolerance",
                value=self.tolerance,
            )

    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> Chain:
        return Chain.empty(batch_size, num_classes, device, self.problem_type)

    def update(self, state: Chain, signal: ExitSignal, exit_index: int) -> tuple[Chain, Tensor, Tensor]:
        predicted = predictions(signal.logits.float(), self.problem_type)
        agrees = state.agrees(predicted, self.problem_type, self.tolerance)
        count = (state.total + 1).masked_fill(~agrees, 0.0)
        return state.follow(predicted, count), count, signal.logits
