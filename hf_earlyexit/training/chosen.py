"""The phase in which the network learns to be right where rows leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..losses import ConsistentObjective, ObjectiveValue
from ..losses.base import row_losses
from ..losses.noise import row_noise
from .checks import no_labels, pop_labels
from .gates import EpsilonSchedule
from .trainer import EarlyExitTrainer

HARDNESS_COLUMN, KEY_COLUMN = "hardness_layers", "example_key"


class ChosenExitTrainer(EarlyExitTrainer):
    """Trainer of the exits at which rows leave, with gates held fixed or learning too.

    Args:
        objective: of the gates; also draws the exits.
        teaches_gates: one loss for all; otherwise the gates are frozen.
        epsilon: chance of a coin's action over the steps.
        seed: of the rollouts.
        kwargs: as in `EarlyExitTrainer`; training rows need the columns `hardness_layers` and `example_key`.
    """

    def __init__(
        self, *, objective: ConsistentObjective, teaches_gates: bool, epsilon: EpsilonSchedule, seed: int, **kwargs: Any
    ) -> None:
        self.reward, self.teaches_gates, self.epsilon, self.rollout_seed = objective, teaches_gates, epsilon, seed
        super().__init__(**kwargs)

    def _choose_what_learns(self, model: nn.Module) -> None:
        super()._choose_what_learns(model)
        model.exit_gates.requires_grad_(self.teaches_gates)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss where rows leave, and with `teaches_gates` the gates' own; evaluations are those of all exits."""
        inputs = dict(inputs)
        hardness, keys = inputs.pop(HARDNESS_COLUMN, None), inputs.pop(KEY_COLUMN, None)
        if hardness is None or keys is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.objective.freezes_backbone:
            self._rest_frozen_parts()
        rest, labels = pop_labels(inputs, self._label_names, self.exit_model.config)
        if labels is None:
            raise no_labels(inputs, self.label_names)
        outputs = model(**rest, early_exit=False)
        losses = row_losses(outputs.exit_logits, *labels)
        self._require_finite(ObjectiveValue(losses.mean(), losses.mean(0)))
        gates = outputs.exit_scalars["gate"]
        value = self._objective()(gates, losses, hardness, self._layers(losses), self._noise(keys, gates))
        loss = value.exit_loss + value.gate_loss if self.teaches_gates else value.exit_loss
        return (loss, outputs) if return_outputs else loss

    def _objective(self) -> ConsistentObjective:
        return replace(self.reward, epsilon=self.epsilon.at(self.state.global_step))

    def _layers(self, like: Tensor) -> Tensor:
        return torch.tensor(self.exit_model.config.exit_layers, dtype=torch.float32, device=like.device)

    def _noise(self, keys: Tensor, gates: Tensor) -> Tensor | None:
        if not self.reward.draws:
            return None
        return row_noise(keys, self.rollout_seed, self.state.global_step, (self.reward.rollouts, gates.shape[1]))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = [name for name in (HARDNESS_COLUMN, KEY_COLUMN) if name not in self._signature_columns]
        self._signature_columns += extra
