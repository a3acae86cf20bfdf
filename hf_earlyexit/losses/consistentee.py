"""Exits learned by reward: only the exit at which a row leaves has to be right, and layers cost easy rows more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional

from ..errors import TrainingError
from ..registry import Registry
from ..values import check_choice, check_real, is_whole

SATURATION = 30.0  # gate logits are cut here: a probability of leaving is never closer to 0 or 1 than 1e-13
ACTIONS = ("sample", "argmax")


class Estimate(NamedTuple):
    """What one batch says.

    Attributes:
        gate_loss: scalar whose gradient in the gates is that of minus the mean reward.
        exit_loss: scalar, the loss of the exits that were chosen; no gradient into the gates.
        reward: mean reward, a number without gradient.
        exit_share: share of rows leaving at each exit `[E]`, without gradient.
    """

    gate_loss: Tensor
    exit_loss: Tensor
    reward: Tensor
    exit_share: Tensor


ESTIMATORS: Registry[Callable[[ConsistentObjective, Tensor, Tensor, Tensor, Tensor | None], Estimate]] = Registry(
    "estimator"
)


@dataclass(frozen=True, kw_only=True)
class ConsistentObjective:
    """The reward of leaving, and how the gates learn from it.

    Leaving row n after layer l is worth minus its loss there, minus `alpha * (1 - hardness / L) * l`. Hard rows thus travel
    for free, and the easiest pay `alpha` a layer.

    Args:
        alpha: price of one layer in units of the loss, at or above 0.
        estimator: "reinforce" draws ways through the gates; "exact" takes the expectation over all exits, which has the
            same optimum and no variance.
        rollouts: ways drawn for every row from one pass through the network, at least 2; their mean reward is the baseline.
        action: "sample" draws from the gate's probability; "argmax" leaves above one half, as the released code does.
        epsilon: chance that an action is a fair coin instead, in `[0, 1]`. It and "argmax" bias the estimate.

    Raises:
        TrainingError, UnknownNameError: for numbers that cannot work.

    Paper: ConsistentEE (https://arxiv.org/abs/2312.11882). The paper samples 8 rollouts (4 for language models) and passes
    each through the network anew; in an encoder the states do not depend on the actions, so one pass serves all. Released
    code: its reward is the loss alone (`alpha=0`), its actions are argmax with epsilon 0, so that rollouts differ by dropout
    only; with one pass they do not differ at all then, and the gates learn nothing. The exact estimator is ours.
    """

    alpha: float = 0.05
    estimator: str = "reinforce"
    rollouts: int = 8
    action: str = "sample"
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        ESTIMATORS.get(self.estimator)
        check_real(0, error=TrainingError, alpha=self.alpha)
        check_real(0, 1, error=TrainingError, epsilon=self.epsilon)
        if not is_whole(self.rollouts, 2):
            raise TrainingError(
                f"rollouts is {self.rollouts!r}; expected a whole number of at least 2: the baseline is the mean of a row's "
                "rollouts, and one alone never differs from it.",
                field="rollouts",
                value=self.rollouts,
            )
        check_choice(ACTIONS, error=TrainingError, action=self.action)

    @property
    def draws(self) -> bool:
        """Whether the estimator needs noise."""
        return self.estimator == "reinforce"

    def rewards(self, row_losses: Tensor, hardness: Tensor, exit_layers: Tensor) -> Tensor:
        """Reward of leaving at each exit.

        Args:
            row_losses: every exit's loss on every row `[B, E]`.
            hardness: in layers `[B]`, 0 to L.
            exit_layers: layer of each exit `[E]`, float; the last is L.

        Returns:
            `[B, E]`, float32, without gradient.
        """
        price = self.alpha * (1 - hardness.float() / exit_layers[-1])
        return -row_losses.detach().float() - price[:, None] * exit_layers

    def __call__(
        self, gates: Tensor, row_losses: Tensor, hardness: Tensor, exit_layers: Tensor, noise: Tensor | None = None
    ) -> Estimate:
        """Losses for gates and exits, in float32.

        Args:
            gates: leave logits `[B, E - 1]`.
            row_losses: every exit's loss on every row `[B, E]`.
            hardness: in layers `[B]`, 0 to L; 0 charges every row the full price.
            exit_layers: layer of each exit `[E]`.
            noise: uniform numbers `[B, rollouts, E - 1]` for "reinforce", as from `row_noise`.
        """
        rewards = self.rewards(row_losses, hardness, exit_layers.float())
        return ESTIMATORS.get(self.estimator)(self, gates, row_losses.float(), rewards, noise)

    def draw_exits(self, gates: Tensor, noise: Tensor) -> Tensor:
        """The exit index at which each rollout leaves, `[B, rollouts]`."""
        chance = _cut(gates.detach()).sigmoid()
        if self.action == "argmax":
            chance = (chance > 0.5).to(chance)
        chance = self.epsilon / 2 + (1 - self.epsilon) * chance
        leaves = functional.pad(noise < chance[:, None], (0, 1), value=True)  # the last exit takes whoever is left
        return leaves.int().argmax(-1)


def exit_log_probabilities(gates: Tensor) -> Tensor:
    """Log-probability of leaving at each exit, from leave logits `[..., E - 1]` to `[..., E]`, float32; they sum to one."""
    gates = _cut(gates)
    stay = functional.pad(functional.logsigmoid(-gates).cumsum(-1), (1, 0))  # still there before each exit
    return stay + functional.pad(functional.logsigmoid(gates), (0, 1))


def _cut(gates: Tensor) -> Tensor:
    return gates.float().clamp(-SATURATION, SATURATION)


@ESTIMATORS.register("exact")
def exact(
    objective: ConsistentObjective, gates: Tensor, row_losses: Tensor, rewards: Tensor, noise: Tensor | None
) -> Estimate:
    """The expectation over the exits, each weighted by the probability of leaving there."""
    chance = exit_log_probabilities(gates).exp()
    expected = (chance * rewards).sum(1).mean()
    chosen = (chance.detach() * row_losses).sum(1).mean()
    return Estimate(-expected, chosen, expected.detach(), chance.detach().mean(0))


@ESTIMATORS.register("reinforce")
def reinforce(
    objective: ConsistentObjective, gates: Tensor, row_losses: Tensor, rewards: Tensor, noise: Tensor | None
) -> Estimate:
    """Rollouts, each pushed by how much better than its row's mean it fared."""
    expected = (gates.shape[0], objective.rollouts, gates.shape[1])
    if noise is None or noise.shape != expected:
        came = None if noise is None else list(noise.shape)
        raise TrainingError(f"noise has shape {came}; reinforce needs uniform numbers {list(expected)}.", field="noise")
    taken = objective.draw_exits(gates, noise)  # [B, K]
    reward = rewards.gather(1, taken)
    advantage = reward - reward.mean(1, keepdim=True)
    log_chance = exit_log_probabilities(gates).gather(1, taken)
    share = functional.one_hot(taken, rewards.shape[1]).float().mean((0, 1))
    return Estimate(-(advantage * log_chance).mean(), row_losses.gather(1, taken).mean(), reward.mean(), share)
