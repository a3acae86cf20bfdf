"""Leave when what the exits said so far promises more reward than going on, as learned from held-back rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..citations import CONSISTENTEE
from ..errors import PolicyError
from ..problem_types import SINGLE_LABEL, largest, row_quality
from ..signals import ExitSignal
from ..values import check_real, check_whole
from .base import register_policy
from .looking import LookingPolicy, Seen
from .measures import certainty, log_odds, probability
from .scanning import LearningRows

FEATURES = 8
WIDTH = 8
NUM_WEIGHTS = (FEATURES + 2) * WIDTH + 1
FLOOR = -20.0  # log-probabilities are cut here
HALF_PRICE = 0.02  # the price of a layer at which the threshold is one half
PRICES = (0.0005, 1.0)
PRICE_SCALE = 0.05  # far above it, only the share of the layers counts, not their price
STEPS, LEARNING_RATE, RIDGE, MOST_ROWS = 200, 0.03, 1e-3, 1000


class History(NamedTuple):
    """What a row's exits have said so far.

    Attributes:
        total, lowest, previous: the sum, the smallest and the last of each class's log-probabilities, `[B, C]`.
        votes: how many exits chose each class, `[B, C]`.
        seen: how many exits there were, `[B]`.
    """

    total: Tensor
    lowest: Tensor
    previous: Tensor
    votes: Tensor
    seen: Tensor

    @classmethod
    def empty(cls, batch_size: int, num_classes: int, device: torch.device | str) -> History:
        """The history before the first exit."""
        zeros = torch.zeros(batch_size, num_classes, device=device)
        return cls(zeros, zeros, zeros, zeros, zeros.new_zeros(batch_size))


@register_policy("reward")
@dataclass(frozen=True, kw_only=True)
class RewardPolicy(LookingPolicy):
    """Leave when the history of answers promises more than going on; the score is in `[0, 1]`.

    One small network, the same at every exit, reads how sure the exit is, how its answer fared at the exits before, and
    how deep it is. It is taught by reward: leaving costs 1 where it does harm (the last exit would be right and this one is
    wrong), and every layer has a price. It learns all prices at once, so that each threshold belongs to one: one half to
    0.02 a layer, lower ones to dearer layers. It learns what weak exits are good for, so calibrate it with
    `keep_weak_exits=True`, and with a larger `learning_share` where rows are few.

    Args:
        weights: of the network, in a row: 81 numbers, and 80 more for each further member.

    Paper: after ConsistentEE (https://arxiv.org/abs/2312.11882), of which it keeps the reward and the exact form of its
    expectation. That it learns from held-back rows, reads answers instead of hidden states, counts harm instead of the loss,
    and covers all prices is ours.
    """

    weights: tuple[float, ...]

    citation: ClassVar[tuple[str, ...]] = (CONSISTENTEE,)
    problem_types: ClassVar[frozenset[str]] = frozenset({SINGLE_LABEL})
    learns: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ("weights",)
    highest_score: ClassVar[float] = 1.0

    def validate(self) -> None:
        if not isinstance(self.weights, tuple) or len(self.weights) < 2 or len(self.weights) % (NUM_WEIGHTS - 1) != 1:
            raise PolicyError(
                f"weights is {self.weights!r}; expected {NUM_WEIGHTS} numbers, and {NUM_WEIGHTS - 1} more for each further "
                "member.",
                field="weights",
                value=self.weights,
            )
        for index, number in enumerate(self.weights):
            check_real(-1e6, 1e6, error=PolicyError, **{f"weights[{index}]": number})
        super().validate()

    def init_state(self, batch_size: int, num_classes: int, device: torch.device | str) -> History:
        return History.empty(batch_size, num_classes, device)

    def look(self, state: History, signal: ExitSignal, exit_index: int) -> tuple[History, Seen]:
        depth = (exit_index + 1) / self.num_exits
        return _look(state, signal.logits, depth)

    def judge(self, state: History, seen: Seen, exit_index: int) -> tuple[History, Tensor]:
        return state, probability(_network(seen, torch.tensor(self.weights, device=seen[0].device)))

    @classmethod
    def learn(cls, trace: LearningRows, members: int = 1, **options: Any) -> dict[str, Any]:
        """Teach the network; the same rows give the same numbers.

        Args:
            trace: labelled rows, not those that choose the thresholds; a few hundred are enough.
            members: networks that are taught apart, each on rows drawn with replacement, and act as one by the mean of their
                leave logits. Steadier, and as many times the work to teach and to ask. One is taught on the rows themselves.
            options: other fields of the policy.
        """
        check_whole(1, error=PolicyError, members=members)
        muted = set(options.get("muted", ()))
        kept = [index for index in range(trace.num_exits) if index not in muted]
        if "weights" in options or len(kept) == 1:
            return {"weights": (0.0,) * NUM_WEIGHTS, **options}
        return {
            "weights": _together([_taught(_part(trace, member, members), kept, member) for member in range(members)]),
            **options,
        }


def _look(state: History, logits: Tensor, depth: float) -> tuple[History, Seen]:
    """The history with one more exit, and what the network sees of each row, `[B]` each and around 0."""
    log_probs = logits.float().log_softmax(-1).clamp_min(FLOOR)
    predicted = largest(log_probs)
    answer = predicted[:, None]
    now = History(
        total=state.total + log_probs,
        lowest=torch.minimum(state.lowest, log_probs),  # of numbers at or below 0
        previous=log_probs,
        votes=state.votes.scatter_add(1, answer, torch.ones_like(log_probs[:, :1])),
        seen=state.seen + 1,
    )

    def of_answer(values: Tensor) -> Tensor:
        return values.gather(1, answer)[:, 0]

    answer_log_prob = of_answer(log_probs)
    risen = torch.where(state.seen == 0, torch.zeros_like(answer_log_prob), answer_log_prob - of_answer(state.previous))
    return now, (
        answer_log_prob + 0.5,
        log_odds(log_probs, predicted) / 2 - 1,
        certainty(log_probs) - 0.5,
        of_answer(now.total) / now.seen + 0.5,
        risen,
        of_answer(now.votes) / now.seen - 0.5,
        (of_answer(now.lowest) + 1) / 2,
        torch.full_like(answer_log_prob, 2 * depth - 1),
    )


def _network(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Leave logits in the shape of the features. Element by element: matrix products depend on the size of the batch."""
    *inner, hidden, outer = weights[:-1].view(FEATURES + 2, -1, 1)
    for feature, row in zip(features, inner, strict=True):
        hidden = (row * feature).add_(hidden)  # [width, B]: many rows side by side
    leave_logits = weights[-1]
    for unit in hidden.relu_().mul_(outer).unbind():
        leave_logits = leave_logits + unit
    return leave_logits


def _part(trace: LearningRows, member: int, members: int) -> LearningRows:
    """The rows that teach one member, at most so many that full batches stay quick."""
    count = min(trace.num_rows, MOST_ROWS)
    if members == 1:
        return trace.select(range(count))
    return trace.select(torch.randint(trace.num_rows, (count,), generator=torch.Generator().manual_seed(member)))


def _together(networks: Sequence[Tensor]) -> tuple[float, ...]:
    """Weights of the one network that says the mean of what these say, `[NUM_WEIGHTS]` each."""
    whole = torch.cat([weights[:-1].view(FEATURES + 2, WIDTH) for weights in networks], 1)
    whole[-1] /= len(networks)
    return (*whole.flatten().tolist(), float(torch.stack([weights[-1] for weights in networks]).mean()))


def _taught(trace: LearningRows, kept: list[int], member: int) -> Tensor:
    """Weights `[NUM_WEIGHTS]` that earn the most over all prices, from a fixed start and in full batches.

    Args:
        trace: the rows.
        kept: exits that are looked at, the last one included.
        member: number of the start.
    """
    looks, state = [], History.empty(trace.num_rows, trace.logits.shape[-1], "cpu")
    for index in kept[:-1]:
        state, features = _look(state, trace.signal(index).logits, (index + 1) / trace.num_exits)
        looks.append(torch.stack(features))
    seen = torch.stack(looks, 1).flatten(1)  # [FEATURES, (K - 1) * N]
    right = row_quality(trace.logits, trace.labels, trace.problem_type)[:, kept] > 0
    harm = (right[:, -1:] & ~right).float().T[:, None]  # [K, 1, N]
    layers = torch.tensor(trace.costs, dtype=torch.float32)[kept]
    prices = torch.logspace(math.log10(PRICES[0]), math.log10(PRICES[1]), 10)[:, None]
    dearer = (prices / HALF_PRICE).log()
    toll = harm + prices * layers[:, None, None]  # [K, prices, N]
    share = 1 / (toll[0].numel() * (prices + PRICE_SCALE))  # of one row at one price in what is made small

    weights = 0.3 * torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(member))
    learned = torch.cat([weights, torch.zeros(1)])  # and how fast a price turns a gate; serving needs only where it turns
    mean, square = torch.zeros_like(learned), torch.zeros_like(learned)
    for step in range(STEPS):
        *_, bias, outer = rows = learned[:-2].view(FEATURES + 2, WIDTH)
        hidden = torch.addmm(bias[:, None], rows[:FEATURES].T, seen).relu_()  # [WIDTH, (K - 1) * N]
        leave = (outer @ hidden + learned[-2]).view(len(looks), 1, -1)
        gates = (leave + dearer).mul_(learned[-1].exp())
        by_gate = _slopes(gates, toll).mul_(share)
        by_leave = learned[-1].exp() * by_gate.sum(1).flatten()
        by_hidden = (outer[:, None] * by_leave).mul_(hidden.sign())
        by_rows = torch.cat([seen @ by_hidden.T, by_hidden.sum(1)[None], (hidden @ by_leave)[None]])
        slope = torch.cat([by_rows.flatten(), by_leave.sum()[None], by_gate.mul_(gates).sum()[None]])
        slope[:-1] += 2 * RIDGE / NUM_WEIGHTS * learned[:-1]
        mean.lerp_(slope, 0.1)
        square.lerp_(slope * slope, 0.001)
        pace = LEARNING_RATE * (1 - step / STEPS) / (1 - 0.9 ** (step + 1))
        learned = learned - pace * mean / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return learned[:-1]


def _slopes(gates: Tensor, toll: Tensor) -> Tensor:
    """By how much leave logits raise what a row is expected to pay, `[K - 1, ...]` as the logits; toll is `[K, ...]`.

    The same as autograd finds through `exit_log_probabilities`, in a fourth of the time: going on from an exit costs what is
    expected of the exits behind it, and only who gets there pays.
    """
    leave = gates.sigmoid()
    stay, slopes, going_on = 1 - leave, torch.empty_like(gates), toll[-1].clone()
    for going, paid, slope in reversed([*zip(leave, toll[:-1], slopes, strict=True)]):
        torch.sub(paid, going_on, out=slope)
        going_on.addcmul_(going, slope)
    slopes.mul_(leave.mul_(stay))
    slopes[1:] *= stay[:-1].cumprod(0)
    return slopes
