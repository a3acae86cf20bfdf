"""Trainer that teaches every exit and reports on each of them."""

from __future__ import annotations

from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..errors import TrainingError
from ..losses import ObjectiveValue
from ..modeling.classifier import label_problem_type
from .arguments import EarlyExitTrainingArguments
from .checks import check_data_set
from .metrics import default_exit_metric, exit_metrics
from .pushing import CarryShim


class EarlyExitTrainer(Trainer):
    """`Trainer` for models with exits: the objective sees all exits, evaluations log a metric for each.

    `compute_metrics` gets what it gets everywhere else: the full model's logits and the labels.

    Args:
        model: a model with exits.
        args: `EarlyExitTrainingArguments`.
        train_dataset, eval_dataset, processing_class, compute_metrics, ...: as in `Trainer`.

    Raises:
        DataError: before the first step, for data that cannot work.
        TrainingError: if one exit's loss is not finite, naming the exit and the step.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean over the batch

    def __init__(self, model: Any = None, args: EarlyExitTrainingArguments | None = None, **kwargs: Any) -> None:
        if not isinstance(args, EarlyExitTrainingArguments):
            raise TrainingError(f"args is {type(args).__name__}; expected EarlyExitTrainingArguments.", field="args")
        self.objective = args.make_objective()
        compute_metrics = kwargs.pop("compute_metrics", None)
        preprocess = kwargs.pop("preprocess_logits_for_metrics", None)
        super().__init__(
            model,
            args,
            compute_metrics=None if compute_metrics is None else _on_last_exit(compute_metrics),
            preprocess_logits_for_metrics=None if preprocess is None else _keeping_exits(preprocess),
            **kwargs,
        )
        self.add_callback(CarryShim)
        config = self.model.config
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                if part is not None:
                    check_data_set(part, name, config.num_labels, config.problem_type)
        if self.objective.freezes_backbone:
            if len(config.exit_layers) == 1:
                raise TrainingError(
                    f"The {args.objective} objective trains early exits only, and the model has none; set exit_layers.",
                    field="objective",
                )
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith("exit_heads."))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The objective over all exits; see `Trainer.compute_loss`."""
        if self.objective.freezes_backbone:
            self._rest_frozen_parts()
        labels = inputs["labels"]
        outputs = model(**{key: value for key, value in inputs.items() if key != "labels"}, early_exit=False)
        problem_type = label_problem_type(self.model.config, labels)
        value = self.objective(outputs.exit_logits, labels, problem_type, self.model.config.exit_layers)
        self._require_finite(value)
        return (value.loss, outputs) if return_outputs else value.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Loss, `(logits, exit_logits)`, labels: every exit runs on every row."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                loss, outputs = None, model(**inputs, early_exit=False)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, (outputs.logits.detach(), outputs.exit_logits.detach()), labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, and a metric for every exit."""
        only_loss = self.args.prediction_loss_only  # without compute_metrics Trainer would ask for the loss alone
        output = super().evaluation_loop(dataloader, description, only_loss, ignore_keys, metric_key_prefix)
        if output.predictions is None:
            return output
        logits, exit_logits = output.predictions
        metrics = dict(output.metrics)
        if output.label_ids is not None and isinstance(exit_logits, np.ndarray):
            config = self.model.config
            labels = np.asarray(output.label_ids)
            metric = self.args.exit_metric or default_exit_metric(label_problem_type(config, torch.as_tensor(labels[:1])))
            values = exit_metrics(exit_logits, labels, config.exit_layers, metric)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(logits, output.label_ids, metrics, output.num_samples)

    def _require_finite(self, value: ObjectiveValue) -> None:
        finite = torch.isfinite(value.per_exit)
        if bool(finite.all()):
            return
        index = int((~finite).nonzero()[0])
        layer = self.model.config.exit_layers[index]
        raise TrainingError(
            f"The loss of the exit after layer {layer} is {float(value.per_exit[index].detach())} at step "
            f"{self.state.global_step}; lower the learning rate or train in a wider dtype.",
            field=f"exit_{layer}_loss",
            value=float(value.per_exit[index].detach()),
        )

    def _rest_frozen_parts(self) -> None:
        """No dropout in what is not trained, so that the exits learn what serving will show them."""
        for name, part in self.model.named_children():
            if name != "exit_heads":
                part.eval()


def _on_last_exit(compute: Any) -> Any:
    @wraps(compute)  # Trainer looks at the signature
    def wrapped(prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        plain = EvalPrediction(prediction.predictions[0], prediction.label_ids, prediction.inputs, prediction.losses)
        return compute(plain, **kwargs)

    return wrapped


def _keeping_exits(preprocess: Any) -> Any:
    def wrapped(outputs: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Any, Tensor]:
        return preprocess(outputs[0], labels), outputs[1]

    return wrapped
