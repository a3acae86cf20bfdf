"""What trainers of captioners and of language models share: exits that learn words, token by token."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..errors import DataError, TrainingError
from ..labels import LEFT_OUT
from ..losses import Progress
from ..modeling.protocol import TorchExitModel
from ..problem_types import SINGLE_LABEL
from .arguments import EarlyExitTrainingArguments
from .layer_dropout import dropped_layers, dropping
from .settings import refused
from .token_metrics import gate_value, row_sums, token_metrics
from .trainer import EarlyExitTrainer

LABELS = "labels"


class TokenTrainer(EarlyExitTrainer):
    """`EarlyExitTrainer` of a model that writes: every exit learns every word whose label is not -100.

    Args:
        model: with exits.
        args: `EarlyExitTrainingArguments`.
        learn_gates: teach the gates, and them alone, whether an exit's first word is the full model's; the objective is not
            used.
        data_collator, train_dataset, eval_dataset, processing_class, ...: as in `Trainer`.
    """

    writes: ClassVar[str]  # what the model writes, in errors

    def __init__(
        self,
        model: nn.Module | None = None,
        args: EarlyExitTrainingArguments | None = None,
        *,
        learn_gates: bool = False,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise TrainingError(
                f"compute_metrics gets logits, and those of whole {self.writes} are not kept: write {self.writes} with "
                "`generate` in a callback instead.",
                field="compute_metrics",
            )
        if learn_gates and kwargs.get("compute_loss_func") is not None:
            raise refused("compute_loss_func", None, "gates learn whether an exit's first word is the full model's")
        self.learn_gates = learn_gates
        super().__init__(model, args, data_collator=data_collator or self._usual_collator(), **kwargs)

    @abstractmethod
    def _usual_collator(self) -> Any:
        """What makes batches unless the caller has something else."""

    @abstractmethod
    def _truth(self, labels: Tensor | None) -> Tensor:
        """The word that each token of the model's input is to say `[B, T]`, -100 where none is learned.

        Raises:
            DataError: without labels.
        """

    @abstractmethod
    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model reads of a batch."""

    def _take(self, model: nn.Module, args: EarlyExitTrainingArguments) -> None:
        super()._take(model, args)
        if list(args.label_names or [LABELS]) != [LABELS]:
            raise refused("label_names", args.label_names, f"the collator of {self.writes} makes the labels")
        if self.learn_gates and args.label_smoothing_factor:
            raise refused("label_smoothing_factor", args.label_smoothing_factor, "gates do not learn from labels")

    def _test_rows(self, rows: Any) -> Any:
        return rows

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        return inputs, inputs.get(LABELS)

    def _choose_what_learns(self, model: TorchExitModel) -> None:
        if self.learn_gates:
            if not len(model.exit_gates):
                raise TrainingError(
                    "The model has no gates to teach; load it with exit_gate='linear' and at least two exits, and with "
                    "init_missing_exits=True if its exits are trained already.",
                    field="exit_gate",
                )
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith("exit_gates."))
            return
        super()._choose_what_learns(model)
        self._freeze_more(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                f"Nothing learns: {model.config.exit_head!r} heads have no weights of their own, all else is frozen. "
                "Load the model with exit_head='tuned', 'linear' or 'low-rank', or train with another objective.",
                field="exit_head",
            )

    def _freeze_more(self, model: TorchExitModel) -> None:
        """Beside what the objective freezes."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in `Trainer`; with an objective that drops layers, rows pass over some of them, forwards and backwards."""
        writer: Any = self.exit_model
        chances, labels = self._chances_to_drop(), inputs.get(LABELS)
        if chances is None or labels is None:
            return super().training_step(model, inputs, num_items_in_batch)
        dropped = dropped_layers(chances, labels, self.args.seed, self.state.global_step)
        with dropping(writer.backbone.layers(writer.token_decoder), dropped):
            return super().training_step(model, inputs, num_items_in_batch)

    def _chances_to_drop(self) -> Tensor | None:
        """Chance of each layer to be passed over by a row in training `[L]`; `None` where none is."""
        return None if self.learn_gates else self.objective.drop_chances(self.exit_model.exit_layers[-1])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective over all exits and labelled tokens, or the gates' loss; see `Trainer.compute_loss`."""
        self._rest_what_does_not_learn()
        truth = self._truth(inputs.get(LABELS))
        learned = truth != LEFT_OUT
        if not bool(learned.any()):
            raise DataError("Every label of a batch is -100, so nothing can be learned or measured.", field=LABELS)
        layers, taught = self.exit_model.config.exit_layers, None
        if model.training and not self.learn_gates:
            taught = self.objective.taught(layers, Progress(self.state.global_step, self.state.max_steps))
        given = {"use_cache": False, **self._given(inputs)}
        outputs = model(**given, early_exit=False, exit_tokens=learned, asked_exits=taught)
        if self.learn_gates:
            value = gate_value(outputs)
        else:
            words = truth[learned]
            losses = self._label_losses(model, outputs, words, num_items_in_batch)
            value = self.objective(outputs.exit_logits, words, SINGLE_LABEL, layers, losses, taught)
        self._require_finite(value, taught)
        return (value.loss, outputs) if return_outputs else value.loss

    def _rest_what_does_not_learn(self) -> None:
        """No dropout in it, as in serving."""
        for part in self.exit_model.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()

    def _kept(self, outputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        return row_sums(outputs, self._truth(labels)), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, accuracy, agreement and loss for every exit, and what the gates do; no predictions are kept."""
        only_loss = self.args.prediction_loss_only
        output = Trainer.evaluation_loop(self, dataloader, description, only_loss, ignore_keys, metric_key_prefix)
        metrics = dict(output.metrics or {})
        sums: Any = output.predictions
        if sums is not None:
            values = token_metrics(sums.sum(0, dtype=np.float64), self.exit_model.config.exit_layers)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(None, None, metrics, output.num_samples)  # type: ignore[arg-type]


def require_labels(labels: Tensor | None) -> Tensor:
    """The labels of a batch.

    Raises:
        DataError: without any.
    """
    if labels is None:
        raise DataError("The batch has no labels; the collator must give them.", field=LABELS)
    return labels
