"""Trainer that teaches every exit and reports on each of them."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..errors import CheckpointError, TrainingError
from ..losses import ObjectiveValue
from ..modeling.classifier import label_problem_type
from ..trace import ExitTrace
from .arguments import EarlyExitTrainingArguments
from .checkpoints import check_checkpoint, newest_complete_checkpoint
from .checks import check_data_set
from .gate_report import gate_metrics
from .metrics import default_exit_metric, exit_metrics
from .pushing import NoPickledSettings

# optimizers that hold every tensor that learns in one state of their own; others split or hide them
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")


class EarlyExitTrainer(NoPickledSettings, Trainer):
    """`Trainer` for models with exits: the objective sees all exits, evaluations log a metric for each.

    `compute_metrics` gets what it gets everywhere else: the full model's logits and the labels. The settings are not pickled
    into what is saved and pushed as a model.

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
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                if part is not None:
                    self._check_rows(part, name)
        self._choose_what_learns()

    def _check_rows(self, rows: Any, name: str) -> None:
        check_data_set(rows, name, self.model.config.num_labels, self.model.config.problem_type)

    def _choose_what_learns(self) -> None:
        for name, parameter in self.model.named_parameters():
            if name.startswith("exit_gates."):  # all exits run here, so nothing teaches when to leave
                parameter.requires_grad_(False)
        if self.objective.freezes_backbone:
            if len(self.model.config.exit_layers) == 1:
                raise TrainingError(
                    f"The {self.args.objective} objective trains early exits only, and the model has none; set exit_layers.",
                    field="objective",
                )
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith("exit_heads."))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; with `True`, the newest checkpoint that was written to its end is taken up.

        Raises:
            CheckpointError: if there is none; for a checkpoint given by name that holds a damaged or foreign file.
        """
        if resume_from_checkpoint is True:
            found = self.newest_checkpoint()
            if found is None:
                raise CheckpointError(
                    f"{self.args.output_dir} holds no complete checkpoint; train without resume_from_checkpoint.",
                    field="resume_from_checkpoint",
                    path=self.args.output_dir,
                )
            resume_from_checkpoint = str(found)
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self._learning())
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run that training can go on from; see `newest_complete_checkpoint`."""
        return newest_complete_checkpoint(self.args.output_dir, self._learning())

    def _learning(self) -> list[Tensor]:
        """What the optimizer holds; nothing where that cannot be said beforehand."""
        if self.optimizer is not None:
            return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.optimizer_cls_and_kwargs is not None or self.args.optim not in PLAIN_OPTIMIZERS:
            return []
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

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
        """Loss, `(logits, exit_logits)` and gates where there are some, labels: every exit runs on every row."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                loss, outputs = None, model(**inputs, early_exit=False)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, *self._kept(outputs, labels)

    def _kept(self, outputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """What an evaluation keeps of a batch in place of logits, and of labels."""
        gates = () if outputs.exit_gates is None else (outputs.exit_gates.detach(),)
        return (outputs.logits.detach(), outputs.exit_logits.detach(), *gates), labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, a metric for every exit, and what the gates do."""
        only_loss = self.args.prediction_loss_only  # without compute_metrics Trainer would ask for the loss alone
        output = super().evaluation_loop(dataloader, description, only_loss, ignore_keys, metric_key_prefix)
        if output.predictions is None:
            return output
        logits, exit_logits, *gates = output.predictions
        metrics = dict(output.metrics)
        if output.label_ids is not None and isinstance(exit_logits, np.ndarray):
            config = self.model.config
            labels = np.asarray(output.label_ids)
            metric = self.args.exit_metric or default_exit_metric(label_problem_type(config, torch.as_tensor(labels[:1])))
            values = exit_metrics(exit_logits, labels, config.exit_layers, metric)
            if gates:
                counted = torch.from_numpy(labels.reshape(len(labels), -1)[:, 0] != -100)
                truth, said, leave = (torch.as_tensor(part)[counted] for part in (labels, exit_logits, gates[0]))
                problem_type = label_problem_type(config, truth)
                trace = ExitTrace(
                    logits=said, labels=truth, exit_layers=config.exit_layers, problem_type=problem_type, gates=leave
                )
                values |= gate_metrics(trace)
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
    def wrapped(outputs: tuple[Tensor, ...], labels: Tensor) -> tuple[Any, ...]:
        return preprocess(outputs[0], labels), *outputs[1:]

    return wrapped
