"""Exits as experts: weighted confidences add up while neighbours agree."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..citations import BEEM
from ..errors import PolicyError
from ..problem_types import MULTI_LABEL, SINGLE_LABEL, predictions
from ..signals import ExitSignal
from ..values import check_choice, check_real
from .agreement import Chain
from .base import ExitPolicy, register_policy
from .measures import log_odds, margin, max_probability, measure
from .scanning import LearningRows

VOTES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": max_probability,
    "margin": margin,
    "log-odds": log_odds,
}
RESETS = ("self", "zero")
HEAVIEST = 1e9  # so that float32 holds every score
NORMALIZATIONS = ("none", "sum", "max")


@register_policy("beem")
@dataclass(frozen=True, kw_only=True)
class BeemPolicy(ExitPolicy):
    """Leave when the weighted votes of agreeing exits have added up to the threshold.

    With C the exit's vote and w its weight, the score is S + w * C where the exit predicts what the exit before it
    predicted, and starts again where it does not. The answer is the leaving exit's own.

    Args:
        weights: one per exit, the last included, each at or above 0.
        reset: where a new chain starts: "self" at w * C, the paper's figure; "zero" at 0, as the released code does.
        vote: C: "probability" (the paper: the largest one), "margin" or "log-odds" of the two largest.
        decay: share of the running score that is kept while exits agree, in `[0, 1]`; 1 is the paper.

    Paper: BEEM (https://arxiv.org/abs/2502.00745). The released code weighs the first exit 0, restarts at 0 and decides
    over the whole batch: `weights=[0, .1, .2, ...], reset="zero"` is that rule, row by row. `vote` and `decay` are ours.
    """

    weights: tuple[float, ...]
    reset: str = "self"
    vote: str = "probability"
    decay: float = 1.0

    citation: ClassVar[tuple[str, ...]] = (BEEM,)
    problem_types: ClassVar[frozenset[str]] = frozenset({SINGLE_LABEL, MULTI_LABEL})

    @property
    def highest_threshold(self) -> float:
        if self.vote == "log-odds":
            return math.inf
        return float(sum(self.weights)) * (1 + 1e-6)  # scores are summed in float32, which may round up

    def validate(self) -> None:
        if not isinstance(self.weights, tuple) or len(self.weights) != self.num_exits:
            raise PolicyError(
                f"weights is {self.weights!r}; expected {self.num_exits} numbers, one per exit.",
                field="weights",
                value=self.weights,
            )
        for index, weight in enumerate(self.weights):
            check_real(0, HEAVIEST, error=PolicyError, **{f"weights[{index}]": weight})
        check_real(0, 1, error=PolicyError, decay=self.decay)
        check_choice(RESETS, error=PolicyError, reset=self.reset)
        check_choice(VOTES, error=PolicyError, vote=self.vote)
        super().validate()

    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> Chain:
        return Chain.empty(batch_size, num_classes, device, self.problem_type)

    def update(self, state: Chain, signal: ExitSignal, exit_index: int) -> tuple[Chain, Tensor, Tensor]:
        logits = signal.logits.float()
        vote = self.weights[exit_index] * measure(logits, VOTES[self.vote], self.problem_type)
        restart = vote if self.reset == "self" else torch.zeros_like(vote)
        predicted = predictions(logits, self.problem_type)
        agrees = state.agrees(predicted, self.problem_type)
        score = torch.where(agrees, self.decay * state.total + vote, restart)
        return state.follow(predicted, score), score, signal.logits

    @classmethod
    def learn(cls, trace: LearningRows, **options: Any) -> dict[str, Any]:
        if "weights" not in options:
            raise PolicyError(
                "The beem policy takes its weights from you (`weights=[...]`, one per exit); beem-c takes them from the "
                "cost of the layers, beem-a from the exits' accuracy.",
                field="weights",
            )
        return options


@register_policy("beem-c")
@dataclass(frozen=True, kw_only=True)
class BeemCostPolicy(BeemPolicy):
    """BEEM with weights from cost: an exit weighs `layer_cost` times its layer's number."""

    @classmethod
    def learn(cls, trace: LearningRows, layer_cost: float = 0.1, **options: Any) -> dict[str, Any]:
        """Weights from the layers' numbers.

        Args:
            trace: the exits to weigh.
            layer_cost: lambda, the cost of one layer; above 0. The released code uses 0.1 for BERT, 0.4 for ALBERT.
            options: other fields of the policy.
        """
        check_real(1e-9, error=PolicyError, layer_cost=layer_cost)
        return {"weights": tuple(layer_cost * layer for layer in trace.exit_layers), **options}


@register_policy("beem-a")
@dataclass(frozen=True, kw_only=True)
class BeemAccuracyPolicy(BeemPolicy):
    """BEEM with weights from accuracy: an exit weighs what it gets right on labelled rows."""

    learns: ClassVar[bool] = True

    @classmethod
    def learn(cls, trace: LearningRows, normalize: str = "none", **options: Any) -> dict[str, Any]:
        """Weights from the exits' accuracy on the rows of `trace`.

        Args:
            trace: labelled rows, not those that choose the thresholds.
            normalize: "none", or divide by the weights' "sum" or "max"; decisions do not change, thresholds scale.
            options: other fields of the policy.
        """
        check_choice(NORMALIZATIONS, error=PolicyError, normalize=normalize)
        accuracy = trace.quality.mean(0).tolist()
        divisor = {"none": 1.0, "sum": sum(accuracy), "max": max(accuracy)}[normalize]
        return {"weights": tuple(value / divisor for value in accuracy), **options}
