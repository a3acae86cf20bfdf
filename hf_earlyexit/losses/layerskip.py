"""A decoder and its exits learn together: layers are dropped at random, and exits are taught in turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..citations import LAYERSKIP
from ..errors import TrainingError
from ..values import check_choice, check_real, check_whole
from .base import OBJECTIVES, Progress
from .weighted import WeightedObjective

CURRICULA = ("rotational", "gradual", "none")
LAYER_SUMS = "layer-sums"


@OBJECTIVES.register("layerskip")
@dataclass(frozen=True, kw_only=True)
class LayerSkipObjective(WeightedObjective):
    """LayerSkip's recipe for models that write: every exit learns the next word, while the network learns to do with less.

    In training a row passes over a layer, which hands on what it was given, with a chance that grows with depth; and at each
    step only some of the early exits are taught, beside the last: the others answer nothing, which saves their vocabulary
    layers. Evaluations run all layers and all exits. With `exit_head="tied"` all exits share the model's own head.

    Args:
        weights: "layer-sums" (the paper's: sums of the layers below, see `exit_scale`), "linear", "uniform", or one number
            per exit, the last above 0. Those of the exits that are taught at a step are divided by their sum.
        exit_scale: factor of the early exits in "layer-sums", in `[0, 1]`.
        layer_dropout: chance p of the last layer to be dropped, in `[0, 1]`; layer l of L, counted from 0, is dropped with
            chance `p (exp(l ln 2 / (L - 1)) - 1)`, so the first never is.
        curriculum: "rotational" (each step the next early exits), "gradual" (from the last down, one layer more every
            T / 2L of the T steps), or "none" (all exits at every step).
        rotation: "rotational" teaches every so manyth early exit at a step; with fewer of them, one at a step.

    Raises:
        TrainingError: for numbers that cannot work.

    Paper: LayerSkip (https://arxiv.org/abs/2404.16710). With layers counted from 0, "layer-sums" weighs the exit after layer
    l by `exit_scale (0 + 1 + ... + l)`, the last by `L - 1 + exit_scale (0 + 1 + ... + L - 2)`: an exit after the first
    layer is not taught. Chances are the same at every step, as in the paper where a trained model is trained on.
    """

    weights: str | Sequence[float] = LAYER_SUMS
    exit_scale: float = 0.2
    layer_dropout: float = 0.1
    curriculum: str = CURRICULA[0]
    rotation: int = 8

    named_weights: ClassVar[tuple[str, ...]] = (LAYER_SUMS, *WeightedObjective.named_weights)
    writers_only: ClassVar[bool] = True
    citation: ClassVar[tuple[str, ...]] = (LAYERSKIP,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real(0, 1, error=TrainingError, exit_scale=self.exit_scale, layer_dropout=self.layer_dropout)
        check_choice(CURRICULA, error=TrainingError, curriculum=self.curriculum)
        check_whole(1, 1 << 16, error=TrainingError, rotation=self.rotation)

    def exit_weights(self, exit_layers: Sequence[int]) -> Tensor:
        if self.weights != LAYER_SUMS:
            weights = super().exit_weights(exit_layers)
        else:
            below = [layer - 1 for layer in exit_layers]  # the layers, counted from 0
            sums = [self.exit_scale * layer * (layer + 1) / 2 for layer in below[:-1]]
            raw = torch.tensor([*sums, below[-1] + self.exit_scale * (below[-1] - 1) * below[-1] / 2])
            weights = raw / raw.sum() if len(raw) > 1 else torch.ones(1)
        if not float(weights[-1]) > 0:
            raise TrainingError(
                f"weights is {self.weights!r}; the last exit is taught at every step, so it must weigh more than 0.",
                field="weights",
                value=self.weights,
            )
        return weights

    def taught(self, exit_layers: Sequence[int], progress: Progress) -> list[int]:
        early, last = range(len(exit_layers) - 1), len(exit_layers) - 1
        if self.curriculum == "rotational":
            turns = min(self.rotation, len(early))
            return [*(index for index in early if index % turns == progress.step % turns), last]
        if self.curriculum == "gradual":
            layers, done = exit_layers[-1], 2 * exit_layers[-1] * progress.step
            return [*(index for index in early if done >= (layers - exit_layers[index]) * progress.steps), last]
        return [*early, last]

    def drop_chances(self, num_layers: int) -> Tensor | None:
        if not self.layer_dropout:
            return None
        depth = torch.arange(num_layers, dtype=torch.float64) / max(num_layers - 1, 1)
        return self.layer_dropout * ((depth * math.log(2)).exp() - 1)
