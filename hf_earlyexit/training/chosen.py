"""The phase in which the network learns to be right where rows, or tokens, leave."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..labels import LEFT_OUT
from ..losses import ConsistentObjective, ObjectiveValue
from ..losses.base import row_losses
from ..losses.noise import row_noise
from ..modeling.protocol import TorchExitModel
from ..problem_types import SINGLE_LABEL
from .checks import no_labels, pop_labels
from .gates import EpsilonSchedule
from .language_model import EarlyExitLanguageModelTrainer, TokenCollator
from .token_trainer import LABELS
from .trainer import EarlyExitTrainer

HARDNESS_COLUMN, KEY_COLUMN = "hardness_layers", "example_key"


class ChosenExits(EarlyExitTrainer):
    """What trainers of the exits at which rows or tokens leave share; gates are held fixed or learn too.

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

    def _choose_what_learns(self, model: TorchExitModel) -> None:
        super()._choose_what_learns(model)
        model.exit_gates.requires_grad_(self.teaches_gates)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss where they leave; evaluations are those of all exits."""
        inputs = dict(inputs)
        hardness, keys = inputs.pop(HARDNESS_COLUMN, None), inputs.pop(KEY_COLUMN, None)
        if hardness is None or keys is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._loss_and_outputs(model, inputs, hardness, keys)
        return (loss, outputs) if return_outputs else loss

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], hardness: Tensor, keys: Tensor
    ) -> tuple[Tensor, Any]:
        """`_chosen_loss` of a batch, and what the model gave."""
        raise NotImplementedError

    def _chosen_loss(self, gates: Tensor, losses: Tensor, hardness: Tensor, keys: Tensor) -> Tensor:
        """The loss where they leave, and with `teaches_gates` the gates' own.

        Args:
            gates: leave logits `[N, E - 1]`.
            losses: of every exit `[N, E]`.
            hardness: in layers `[N]`; keys: from `row_keys` `[N]`.
        """
        self._require_finite(ObjectiveValue(losses.mean(), losses.mean(0)))
        objective = replace(self.reward, epsilon=self.epsilon.at(self.state.global_step))
        noise = None
        if self.reward.draws:
            noise = row_noise(keys, self.rollout_seed, self.state.global_step, (self.reward.rollouts, gates.shape[1]))
        layers = torch.tensor(self.exit_model.config.exit_layers, dtype=torch.float32, device=losses.device)
        value = objective(gates, losses, hardness, layers, noise)
        return value.exit_loss + value.gate_loss if self.teaches_gates else value.exit_loss

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns  # a list by now
        columns.extend(name for name in (HARDNESS_COLUMN, KEY_COLUMN) if name not in columns)


class ChosenExitTrainer(ChosenExits):
    """Of classifiers: each row leaves at one exit."""

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], hardness: Tensor, keys: Tensor
    ) -> tuple[Tensor, Any]:
        if self.objective.freezes_backbone:
            self._rest_frozen_parts()
        rest, labels = pop_labels(inputs, self._label_names, self.exit_model.config)
        if labels is None:
            raise no_labels(inputs, self.label_names)
        outputs = model(**rest, early_exit=False)
        losses = row_losses(outputs.exit_logits, *labels)
        return self._chosen_loss(outputs.exit_scalars["gate"], losses, hardness, keys), outputs


class ChosenTokenTrainer(ChosenExits, EarlyExitLanguageModelTrainer):
    """Of language models: each token leaves at one exit."""

    def _usual_collator(self) -> ChosenTokenCollator:
        return ChosenTokenCollator()

    def _chances_to_drop(self) -> None:
        """None: where tokens leave is measured with all layers."""

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], hardness: Tensor, keys: Tensor
    ) -> tuple[Tensor, Any]:
        self._rest_what_does_not_learn()
        truth = self._truth(inputs.get(LABELS))
        learned = truth != LEFT_OUT
        outputs = model(**{"use_cache": False, **self._given(inputs)}, early_exit=False, exit_tokens=learned)
        losses = row_losses(outputs.exit_logits, truth[learned], SINGLE_LABEL)
        return self._chosen_loss(outputs.exit_scalars["gate"], losses, hardness[learned], keys[learned]), outputs


class ChosenTokenCollator(TokenCollator):
    """As `TokenCollator`; rows that say how hard their tokens are, and by which keys they draw, keep both `[B, T]`."""

    def __call__(self, rows: Any) -> dict[str, Tensor]:
        batch = super().__call__(rows)
        for name in (HARDNESS_COLUMN, KEY_COLUMN):
            if name in rows[0]:
                parts = [torch.as_tensor(row[name]) for row in rows]
                batch[name] = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return batch
