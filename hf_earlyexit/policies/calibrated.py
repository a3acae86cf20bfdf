"""BEEM whose votes are calibrated: each exit says how likely leaving does no harm, and a chain averages what it heard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..citations import BEEM
from ..errors import PolicyError
from ..problem_types import SINGLE_LABEL, largest
from ..signals import ExitSignal
from ..values import check_real
from .agreement import Chain
from .base import register_policy
from .looking import LookingPolicy, Seen
from .measures import log_odds, probability
from .scanning import LearningRows, OfLogits


def _answer_and_lead(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The class that each row predicts, and its log-odds against the second, `[N]` each."""
    logits = logits.float()
    predicted = largest(logits)
    return predicted, log_odds(logits, predicted)


@register_policy("beem-calibrated")
@dataclass(frozen=True, kw_only=True)
class CalibratedBeemPolicy(LookingPolicy):
    """Leave when the estimated probability that leaving does no harm reaches the threshold, in `[0, 1]`.

    Harm means that the last exit would be right where this one is wrong. An exit's vote is the log-odds of no harm, a
    straight line in the log-odds of its two best classes, with an offset for the class it predicts. While exits agree the
    score keeps `memory` of what came before; neighbours are strongly correlated, so votes are averaged, not summed.

    Args:
        slopes: one per exit.
        offsets: for each exit, one per class.
        memory: share of the running score kept while exits agree, in `[0, 1)`; 0 looks at one exit at a time.

    Paper: after BEEM (https://arxiv.org/abs/2502.00745), whose probabilities are never below 1/C, so that long chains count
    by their length; the calibrated vote, the average and the skipping of weak exits are ours.
    """

    slopes: tuple[float, ...]
    offsets: tuple[tuple[float, ...], ...]
    memory: float = 0.25

    citation: ClassVar[tuple[str, ...]] = (BEEM,)
    problem_types: ClassVar[frozenset[str]] = frozenset({SINGLE_LABEL})
    learns: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("slopes", "offsets")
    of_logits: ClassVar[OfLogits | None] = staticmethod(_answer_and_lead)
    highest_score: ClassVar[float] = 1.0

    def validate(self) -> None:
        for name, values in (("slopes", self.slopes), ("offsets", self.offsets)):
            if not isinstance(values, tuple) or len(values) != self.num_exits:
                raise PolicyError(
                    f"{name} is {values!r}; expected {self.num_exits} entries, one per exit.", field=name, value=values
                )
        for index, row in enumerate(self.offsets):
            if not isinstance(row, tuple):
                raise PolicyError(
                    f"offsets[{index}] is {row!r}; expected one number per class.", field="offsets", value=self.offsets
                )
        for index, (slope, row) in enumerate(zip(self.slopes, self.offsets, strict=True)):
            for number in (slope, *row):
                check_real(-1e6, 1e6, error=PolicyError, **{f"slopes or offsets of exit {index}": number})
        check_real(0, math.nextafter(1, 0), error=PolicyError, memory=self.memory)
        super().validate()

    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> Chain:
        return Chain.empty(batch_size, num_classes, device, self.problem_type)

    def look(self, state: Chain, signal: ExitSignal, exit_index: int) -> tuple[Chain, Seen]:
        return state, _answer_and_lead(signal.logits)

    def judge(self, state: Chain, seen: Seen, exit_index: int) -> tuple[Chain, Tensor]:
        predicted, lead = seen
        vote = lead.new_tensor(self.offsets[exit_index])[predicted] + self.slopes[exit_index] * lead
        agrees = state.agrees(predicted, self.problem_type)
        running = torch.where(agrees, (1 - self.memory) * vote + self.memory * state.total, vote)
        return state.follow(predicted, running), probability(running)

    @classmethod
    def learn(cls, trace: LearningRows, ridge: float = 1.0, **options: Any) -> dict[str, Any]:
        """One logistic regression per exit.

        Args:
            trace: labelled rows, not those that choose the thresholds; a few hundred are enough.
            ridge: penalty on slope and offsets, above 0.
            options: other fields of the policy.
        """
        check_real(1e-6, error=PolicyError, ridge=ridge)
        right = trace.quality > 0
        harmless = ~(right[:, -1:] & ~right)
        classes, lines = trace.signal(0).logits.shape[-1], []
        for index in range(trace.num_exits):
            predicted, lead = trace.row_values(_answer_and_lead, index)
            lines.append(_fit_line(predicted, lead, harmless[:, index], classes, ridge))
        return {"slopes": tuple(slope for slope, _ in lines), "offsets": tuple(offsets for _, offsets in lines), **options}


def _fit_line(
    predicted: Tensor, lead: Tensor, harmless: Tensor, num_classes: int, ridge: float
) -> tuple[float, tuple[float, ...]]:
    """Slope and offsets of one exit from what `_answer_and_lead` gives and whether leaving was harmless `[N]`, by Newton's
    method.

    One harmful row is made up at the mean of all rows, so that an exit that never harmed is still not taken for certain. The
    class that a row predicts is one feature among C, so sums are taken class by class and no table of features is made.
    """
    lead = lead.double()

    def by_class(values: Tensor) -> Tensor:
        return torch.bincount(predicted, values, num_classes)

    plain, target = torch.stack([torch.ones_like(lead), lead]), harmless.double()  # [2, N], [N]
    made_up = torch.cat([plain.mean(1), by_class(plain[0]) / len(lead)])
    penalty = torch.full((num_classes + 2,), ridge, dtype=torch.float64)
    penalty[0] = 1e-6  # the common offset is free
    weights = torch.zeros(num_classes + 2, dtype=torch.float64)
    for _ in range(50):
        chance = (weights[:2] @ plain + weights[2:][predicted]).clamp(-30, 30).sigmoid()
        harmful = (weights @ made_up).clamp(-30, 30).sigmoid()
        missing = target - chance
        slope = torch.cat([plain @ missing, by_class(missing)]) - harmful * made_up - penalty * weights
        weight = chance * (1 - chance) + 1e-6
        across = torch.stack([by_class(weight), by_class(weight * lead)])  # [2, C]
        curvature = torch.cat([torch.cat([plain * weight @ plain.T, across], 1), torch.cat([across.T, across[0].diag()], 1)])
        curvature += (harmful * (1 - harmful) + 1e-6) * made_up.outer(made_up) + penalty.diag()
        step = torch.linalg.solve(curvature, slope)
        weights = weights + step
        if float(step.abs().max()) < 1e-8:
            break
    return float(weights[1]), tuple((weights[0] + weights[2:]).tolist())
