"""Teaching the gates while the network is held still: no layer runs, all gates learn at once from cached states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from ..errors import TrainingError
from ..losses.consistentee import ConsistentObjective
from ..losses.noise import row_noise
from ..values import check_real, check_whole, is_real, unexpected
from .states import GateStates, TokenStates


@dataclass(frozen=True, kw_only=True)
class EpsilonSchedule:
    """Chance of a coin's action after so many optimizer steps: `end + (start - end) * exp(-steps / decay)`.

    Paper: the released code of ConsistentEE counts one step per layer visited; its BERT settings are 0, 0 and 1000.
    """

    start: float = 0.0
    end: float = 0.0
    decay: float = 1000.0

    def __post_init__(self) -> None:
        check_real(0, 1, error=TrainingError, epsilon_start=self.start, epsilon_end=self.end)
        if not is_real(self.decay, 0) or self.decay == 0:
            raise unexpected("epsilon_decay", self.decay, "a number of steps above 0", TrainingError)

    def at(self, step: int) -> float:
        """The chance at this step."""
        return self.end + (self.start - self.end) * math.exp(-step / self.decay)


@dataclass(frozen=True, kw_only=True)
class GateRecipe:
    """How gates are taught on cached states.

    Args:
        epochs: passes over the rows, at least 1.
        batch_size: rows a step, at least 1.
        learning_rate: of AdamW without weight decay, falling in a straight line to 0; gradients are clipped to norm 1.
        seed: of the order of the rows and of the rollouts.

    Paper: ConsistentEE trains for 1 or 2 epochs at 3e-4 with batches of 32.
    """

    epochs: int = 2
    batch_size: int = 32
    learning_rate: float = 3e-4
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole(1, error=TrainingError, epochs=self.epochs, batch_size=self.batch_size)
        if not is_real(self.learning_rate, 0) or self.learning_rate == 0:
            raise unexpected("learning_rate", self.learning_rate, "a finite number above 0", TrainingError)


def train_gates(
    gates: nn.ModuleDict,
    data: GateStates | TokenStates,
    hardness: Tensor,
    keys: Tensor,
    objective: ConsistentObjective,
    recipe: GateRecipe | None = None,
    epsilon: EpsilonSchedule | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Teach the gates in place. The same arguments give the same gates, to the bit.

    Args:
        gates: of a model, one per exit but the last.
        data: their rows, or tokens.
        hardness: of these in layers `[N]`.
        keys: of these, int64 `[N]`, from `row_keys`.
        objective: what they learn.
        recipe: how long and how fast.
        epsilon: chance of a coin's action over the steps; the objective's own, unchanging, by default.
        after_epoch: called with the epoch, from 1, when the gates hold what they learned in it.
    """
    modules = list(gates.values())
    if not modules:
        raise TrainingError(
            "The model has no gates; load it with exit_gate='mlp' and at least two exits.", field="exit_gate"
        )
    recipe = recipe or GateRecipe()
    parameters = {name: value.detach().float() for name, value in stack_module_state(modules)[0].items()}  # [E - 1, ...]
    device = next(iter(parameters.values())).device
    for value in parameters.values():
        value.requires_grad_()
    outcomes = data.outcomes
    layers = torch.tensor(outcomes.exit_layers, dtype=torch.float32, device=device)
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=0.0)
    steps_a_pass = math.ceil(len(keys) / recipe.batch_size)
    shrink = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, recipe.epochs * steps_a_pass)
    order = torch.Generator().manual_seed(recipe.seed)
    step = 0
    for epoch in range(1, recipe.epochs + 1):
        for rows in torch.randperm(len(keys), generator=order).split(recipe.batch_size):
            state, logits = data.states[rows].to(device), data.answers(rows).to(device)
            now = objective if epsilon is None else replace(objective, epsilon=epsilon.at(step))
            noise = None
            if now.draws:
                noise = row_noise(keys[rows].to(device), recipe.seed, epoch, (now.rollouts, len(modules)))
            leave_logits = _all_gates(modules[0], parameters, state, logits)
            value = now(leave_logits, outcomes.losses[rows].to(device), hardness[rows].to(device), layers, noise)
            optimizer.zero_grad()
            value.gate_loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            shrink.step()
            step += 1
        _write_back(modules, parameters)
        if after_epoch is not None:
            after_epoch(epoch)


def _all_gates(kind: nn.Module, parameters: dict[str, Tensor], state: Tensor, logits: Tensor) -> Tensor:
    """Leave logits `[B, E - 1]` of all gates in one go, from states `[B, E - 1, H]` and logits `[B, E - 1, C]`."""
    ask = vmap(lambda of_gate, *seen: functional_call(kind, of_gate, seen), in_dims=(0, 1, 1), out_dims=1)
    leave_logits: Tensor = ask(parameters, state, logits)
    return leave_logits


def _write_back(modules: list[nn.Module], parameters: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for index, module in enumerate(modules):
            for name, parameter in module.named_parameters():
                parameter.copy_(parameters[name][index])
