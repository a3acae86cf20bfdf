"""Trainer that teaches every exit and reports on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, TrainOutput
from transformers.utils import logging

from ..errors import CheckpointError, TrainingError
from ..labels import LABEL_COLUMNS, LEFT_OUT, label_problem_type
from ..losses import Objective, ObjectiveValue
from ..losses.base import LabelLosses, label_losses
from ..modeling.classifier import EarlyExitClassifier
from ..modeling.protocol import TorchExitModel
from ..modeling.wrapped import unwrapped
from ..problem_types import MULTI_LABEL, SINGLE_LABEL
from ..serving.reader import reads_images
from ..trace import ExitTrace
from .arguments import EarlyExitTrainingArguments
from .checkpoints import check_checkpoint, newest_complete_checkpoint
from .checks import NamesToNumbers, check_data_set, check_token_ids, label_column, no_labels, pop_labels, without_labels
from .gate_report import gate_metrics
from .metrics import by_output, default_exit_metric, exit_metrics, keeping_exits, on_last_exit, one_array
from .pictures import opened_rows
from .pushing import NoPickledSettings
from .settings import (
    check_adapters,
    check_arguments,
    check_ignored,
    check_loss_func,
    check_settings,
    given_losses,
    has_adapters,
    smoothing_error,
    split_error,
)
from .weights import WeightsByName

logger = logging.get_logger(__name__)

# optimizers that hold every tensor that learns in one state of their own; others split or hide them
PLAIN_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")

TRAINER_TAKES = frozenset(signature(Trainer).parameters)


class EarlyExitTrainer(NoPickledSettings, WeightsByName, Trainer):
    """`Trainer` for models with exits: the objective sees all exits, evaluations log a metric for each.

    `compute_metrics` gets what it gets everywhere else: the full model's logits and the labels. The settings are not pickled
    into what is saved and pushed as a model.

    Args:
        model: a model with exits.
        args: `EarlyExitTrainingArguments`.
        train_dataset, eval_dataset, processing_class, compute_metrics, ...: as in `Trainer`. Rows of image classifiers hold
            a picture in any form that `predict` takes, or pixel values; `processing_class` is then the image processor.

    Raises:
        DataError: before the first step, for data that cannot work.
        UnknownNameError: for an argument that `Trainer` has not.
        TrainingError: if one exit's loss is not finite, naming the exit and the step.
    """

    trains: ClassVar[type] = EarlyExitClassifier
    loss_is_scaled_for_ga = False  # the loss is a mean over the batch

    args: EarlyExitTrainingArguments
    exit_model: TorchExitModel
    objective: Objective

    def __init__(
        self, model: nn.Module | None = None, args: EarlyExitTrainingArguments | None = None, **kwargs: Any
    ) -> None:
        if not isinstance(args, EarlyExitTrainingArguments):
            raise TrainingError(f"args is {type(args).__name__}; expected EarlyExitTrainingArguments.", field="args")
        check_arguments({name: value for name, value in kwargs.items() if name not in TRAINER_TAKES}, Trainer, {})
        self.objective = args.make_objective()
        if kwargs.get("compute_loss_func") is not None:
            check_loss_func(args)
        if model is not None:
            self._take(model, args)
        compute_metrics = kwargs.pop("compute_metrics", None)
        preprocess = kwargs.pop("preprocess_logits_for_metrics", None)
        super().__init__(
            model,
            args,
            compute_metrics=None if compute_metrics is None else on_last_exit(compute_metrics),
            preprocess_logits_for_metrics=None if preprocess is None else keeping_exits(preprocess),
            **kwargs,
        )
        for name in ("fsdp", "deepspeed"):
            if getattr(self, f"is_{name}_enabled"):  # by the configuration of `accelerate launch`
                raise split_error(name)
        self._makes_labels = kwargs.get("data_collator") is not None  # a collator of the user's own may
        for name, rows in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            for part in rows.values() if isinstance(rows, dict) else [rows]:
                if part is not None:
                    self._check_rows(part, name, needed=not self._makes_labels)
        self.train_dataset = self._opened(self.train_dataset, "train_dataset")
        self.eval_dataset = self._opened(self.eval_dataset, "eval_dataset")
        self._choose_what_learns(self.exit_model)

    def _take(self, model: nn.Module, args: EarlyExitTrainingArguments) -> None:
        """See that a model has exits and the settings suit it."""
        self.exit_model = unwrapped(model)
        if not isinstance(self.exit_model, self.trains):
            raise TrainingError(
                f"{type(self).__name__} trains {self.trains.__name__} models; model is "
                f"{type(self.exit_model).__name__}, which has a trainer of its own.",
                field="model",
            )
        check_settings(args, self.objective, self.exit_model)
        check_adapters(model, self.exit_model)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """As in `Trainer`; what the objective freezes is frozen in the new model, too."""
        model = super().call_model_init(trial)
        self._take(model, self.args)
        if getattr(self, "is_in_train", False):  # the first model is made before the data sets are known
            self._choose_what_learns(self.exit_model)
        return model

    def _check_rows(self, rows: Any, name: str, needed: bool = True) -> None:
        config = self.exit_model.config
        kind = check_data_set(rows, name, config, self._label_names, needed)
        if not self._makes_labels and not reads_images(self.exit_model):
            check_token_ids(rows, name, padded=self.processing_class is not None)
        if self.args.label_smoothing_factor and kind.problem_type not in (None, SINGLE_LABEL):
            raise smoothing_error(kind.problem_type)
        if kind.problem_type == MULTI_LABEL and config.problem_type is None:
            config.problem_type = MULTI_LABEL  # as the stock model does at the first batch; who loads it must know
            logger.warning(f"The labels of {name} are rows of values: problem_type is set to {MULTI_LABEL} in the config.")
        if kind.may_be_names and not isinstance(self.data_collator, NamesToNumbers):
            self.data_collator = NamesToNumbers(self.data_collator, config, (*self._label_names, *LABEL_COLUMNS))

    def _opened(self, rows: Any, name: str) -> Any:
        """Rows with pixel values where the model reads pictures; a collator of the user's own makes them by itself."""
        if rows is None or self._makes_labels or not reads_images(self.exit_model):
            return rows
        return opened_rows(rows, name, self.processing_class)

    @property
    def _label_names(self) -> tuple[str, ...]:
        return tuple(self.args.label_names or ())

    def _choose_what_learns(self, model: TorchExitModel) -> None:
        for name, parameter in model.named_parameters():
            if name.startswith("exit_gates."):  # all exits run here, so nothing teaches when to leave
                parameter.requires_grad_(False)
        if self.objective.freezes_backbone:
            if len(model.config.exit_layers) == 1:
                raise TrainingError(
                    f"The {self.args.objective} objective trains early exits only, and the model has none; set exit_layers.",
                    field="objective",
                )
            adapted = has_adapters(model)  # then PEFT has chosen which of the exits' tensors are copies that do not learn
            for name, parameter in model.named_parameters():
                learns = name.startswith("exit_heads.") and (parameter.requires_grad or not adapted)
                parameter.requires_grad_(learns)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As in `Trainer`; with `True`, the newest checkpoint that was written to its end is taken up.

        Raises:
            CheckpointError: if there is none; for a checkpoint given by name that holds a damaged or foreign file.
            TrainingError: where `ignore_keys_for_eval` names logits, which evaluations are made of.
        """
        check_ignored("ignore_keys_for_eval", ignore_keys_for_eval)
        if resume_from_checkpoint is True:
            newest = self.newest_checkpoint()
            if newest is None:
                raise CheckpointError(
                    f"{self.args.output_dir} holds no complete checkpoint; train without resume_from_checkpoint.",
                    field="resume_from_checkpoint",
                    path=self.args.output_dir,
                )
            resume_from_checkpoint = str(newest)
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint, self._learning())
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint of the run that training can go on from; see `newest_complete_checkpoint`."""
        return newest_complete_checkpoint(str(self.args.output_dir), self._learning())

    def _learning(self) -> list[Tensor]:
        """What the optimizer holds; nothing where that cannot be said beforehand."""
        if self.optimizer is not None:
            return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.optimizer_cls_and_kwargs is not None or self.args.optim not in PLAIN_OPTIMIZERS:
            return []
        model: Any = self.model  # there is one by now
        return [parameter for parameter in model.parameters() if parameter.requires_grad]

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
        config = self.exit_model.config
        rest, labels = pop_labels(inputs, self._label_names, config)
        if labels is None:
            raise no_labels(inputs, self.label_names)
        outputs = model(**rest, early_exit=False)
        losses = self._label_losses(model, outputs, labels.values, num_items_in_batch)
        value = self.objective(outputs.exit_logits, *labels, config.exit_layers, losses)
        self._require_finite(value)
        return (value.loss, outputs) if return_outputs else value.loss

    def _label_losses(self, model: nn.Module, outputs: Any, labels: Tensor, num_items: Any) -> LabelLosses:
        """What labels cost at every exit: `compute_loss_func`, if there is one, on the outputs with that exit's logits."""
        if self.compute_loss_func is None:
            return partial(label_losses, smoothing=self.args.label_smoothing_factor)
        if not model.training:
            num_items, scale = (labels != LEFT_OUT).sum(), 1
        else:  # it is scaled for the accumulated batch already, and the Trainer is about to scale it again
            scale = self.current_gradient_accumulation_steps
            if num_items is not None and self.args.average_tokens_across_devices:
                scale *= self.accelerator.num_processes if self.args.n_gpu <= 1 else self.args.n_gpu
        return partial(given_losses, self.compute_loss_func, outputs, num_items, scale)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Tensor | None]:
        """Loss, `(logits, exit_logits)` and gates where there are some, labels: every exit runs on every row.

        Raises:
            TrainingError: where `ignore_keys` names one of these; hidden states and the like are never kept.
        """
        check_ignored("ignore_keys", ignore_keys)
        inputs = self._prepare_inputs(inputs)
        rest, labels = self._split(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if labels is None:
                loss, outputs = None, model(**rest, early_exit=False)
            else:
                loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss, None, None
        return loss, *self._kept(outputs, labels)

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        rest, labels = pop_labels(inputs, self._label_names, self.exit_model.config)
        return rest, None if labels is None else labels.values

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; rows given here are checked as those given at set-up are."""
        if eval_dataset is not None and not isinstance(eval_dataset, (str, dict)):
            self._check_rows(eval_dataset, "eval_dataset", needed=not self._makes_labels)
            eval_dataset = self._opened(eval_dataset, "eval_dataset")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in `Trainer`; rows may lack labels, or all have the label -1 that stands for none in the GLUE tasks."""
        return super().predict(self._test_rows(test_dataset), *args, **kwargs)

    def _test_rows(self, rows: Any) -> Any:
        """Rows to predict, without labels that are none."""
        column = label_column(rows, "test_dataset", self._label_names)
        if column is not None and column.is_unlabelled:
            rows = without_labels(rows, (*self._label_names, *LABEL_COLUMNS))
        self._check_rows(rows, "test_dataset", needed=False)
        return self._opened(rows, "test_dataset")

    def _kept(self, outputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        """What an evaluation keeps of a batch in place of logits, and of labels."""
        gates = (outputs.exit_scalars["gate"].detach(),) if "gate" in (outputs.exit_scalars or {}) else ()
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
        logits, exit_logits, *gates = by_output(output.predictions)
        metrics = dict(output.metrics or {})
        if output.label_ids is not None:
            config = self.exit_model.config
            exit_logits, labels, *gates = map(one_array, (exit_logits, output.label_ids, *gates))
            metric = self.args.exit_metric or default_exit_metric(label_problem_type(config, torch.as_tensor(labels[:1])))
            values = exit_metrics(exit_logits, labels, config.exit_layers, metric)
            if gates:
                counted = torch.from_numpy(labels.reshape(len(labels), -1)[:, 0] != -100)
                truth, kept, leave = (torch.as_tensor(part)[counted] for part in (labels, exit_logits, gates[0]))
                problem_type = label_problem_type(config, truth)
                trace = ExitTrace(
                    logits=kept,
                    labels=truth,
                    exit_layers=config.exit_layers,
                    problem_type=problem_type,
                    scalars={"gate": leave},
                )
                values |= gate_metrics(trace)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(logits, output.label_ids, metrics, output.num_samples)

    def _require_finite(self, value: ObjectiveValue, taught: Sequence[int] | None = None) -> None:
        finite = torch.isfinite(value.per_exit)
        if bool(finite.all()):
            return
        index = int((~finite).nonzero()[0])
        layer = self.exit_model.config.exit_layers[index if taught is None else taught[index]]
        raise TrainingError(
            f"The loss of the exit after layer {layer} is {float(value.per_exit[index].detach())} at step "
            f"{self.state.global_step}; lower the learning rate or train in a wider dtype.",
            field=f"exit_{layer}_loss",
            value=float(value.per_exit[index].detach()),
        )

    def _rest_frozen_parts(self) -> None:
        """No dropout in what is not trained, so that the exits learn what serving will show them."""
        for name, part in self.exit_model.named_children():
            if name != "exit_heads":
                part.eval()
