"""Trainer that teaches every exit of a captioner, and reports on each of them token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..errors import DataError, TrainingError
from ..problem_types import SINGLE_LABEL
from ..training.arguments import EarlyExitTrainingArguments
from ..training.settings import refused
from ..training.token_metrics import gate_value, row_sums, token_metrics
from ..training.trainer import EarlyExitTrainer
from .batches import FEATURES
from .data import CaptionCollator, CaptionRows, check_caption_rows
from .model import EarlyExitVisionEncoderDecoder


class EarlyExitCaptioningTrainer(EarlyExitTrainer):
    """`Trainer` for `EarlyExitVisionEncoderDecoder`: every exit learns every word, evaluations log each exit's accuracy.

    The objectives are those of `EarlyExitTrainer`, over the tokens whose label is not -100: "weighted" and "distillation"
    train all weights together, "two-stage" the exits alone. What does not learn has no dropout. Evaluations log
    `exit_<layer>_token_accuracy` and `exit_<layer>_loss`, and with gates `gate_agreement`, `gate_layers` and
    `exit_<layer>_share`: what tokens would do that leave where their gates say one half or more.

    Args:
        model: a captioner with exits.
        args: `EarlyExitTrainingArguments`.
        learn_gates: teach the gates, and them alone, whether an exit's first word is the full model's; the objective is not
            used.
        data_collator: `CaptionCollator` by default. Batches may hold `decoder_input_ids` and `decoder_position_ids`;
            without them the labels are shifted, as in the stock model.
        train_dataset, eval_dataset, processing_class, ...: as in `Trainer`. Rows hold `labels` and `pixel_values`, or
            `encoder_hidden_states`, the encoder's last states; with these the encoder does not learn.

    A `compute_loss_func` gets the logits `[N, V]` and labels `[N]` of the N tokens whose label is not -100.

    Raises:
        DataError: before the first step, for captions that cannot be learned; with the batch, where rows cannot be looked
            through.
        TrainingError: for what cannot be trained, or if one exit's loss is not finite.

    Paper: CapEEN (https://arxiv.org/abs/2410.04433) trains exits on a frozen backbone by half cross entropy and half
    divergence from the last exit: "two-stage" with `strength=1` and `direction="last-to-exit"`, but for a factor of 2.
    """

    trains = EarlyExitVisionEncoderDecoder

    def __init__(
        self,
        model: Any = None,
        args: EarlyExitTrainingArguments | None = None,
        *,
        learn_gates: bool = False,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("compute_metrics") is not None:
            raise TrainingError(
                "compute_metrics gets logits, and those of whole captions are not kept: write captions with `generate` in a "
                "callback instead.",
                field="compute_metrics",
            )
        if learn_gates and kwargs.get("compute_loss_func") is not None:
            raise refused("compute_loss_func", None, "gates learn whether an exit's first word is the full model's")
        self.learn_gates = learn_gates
        super().__init__(model, args, data_collator=data_collator or CaptionCollator(), **kwargs)

    def _check_rows(self, rows: Any, name: str, needed: bool = True) -> None:
        check_caption_rows(rows, name, self.exit_model.config.decoder.vocab_size)

    def _take(self, model: Any, args: EarlyExitTrainingArguments) -> None:
        super()._take(model, args)
        if list(args.label_names or ["labels"]) != ["labels"]:
            raise refused("label_names", args.label_names, "the collator of captions makes the labels")
        if self.learn_gates and args.label_smoothing_factor:
            raise refused("label_smoothing_factor", args.label_smoothing_factor, "gates do not learn from labels")

    def _test_rows(self, rows: Any) -> Any:
        return rows

    def _split(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        return inputs, inputs.get("labels")

    def _choose_what_learns(self, model: nn.Module) -> None:
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
        encoder = model.encoder
        if _has_features(self.train_dataset):
            encoder.requires_grad_(False)
        pooler = getattr(encoder, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # its answer is not used
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise TrainingError(
                f"Nothing learns: {model.config.exit_head!r} heads have no weights of their own, all else is frozen. "
                "Load the model with exit_head='tuned', 'linear' or 'low-rank', or train with another objective.",
                field="exit_head",
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        extra = (FEATURES, "decoder_position_ids")
        self._signature_columns += [name for name in extra if name not in self._signature_columns]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective over all exits and labelled tokens, or the gates' loss; see `Trainer.compute_loss`."""
        for part in self.exit_model.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()  # no dropout in what does not learn, as in serving
        labels = _given(inputs.get("labels"))
        learned = labels != -100
        if not bool(learned.any()):
            raise DataError("Every label of a batch is -100, so nothing can be learned or measured.", field="labels")
        given = {"use_cache": False, **{name: value for name, value in inputs.items() if name != "labels"}}
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self.exit_model.prepare_decoder_input_ids_from_labels(labels)
        outputs = model(**given, early_exit=False, exit_tokens=learned)
        if self.learn_gates:
            value = gate_value(outputs)
        else:
            truth = labels[learned]
            losses = self._label_losses(model, outputs, truth, num_items_in_batch)
            value = self.objective(outputs.exit_logits, truth, SINGLE_LABEL, self.exit_model.config.exit_layers, losses)
        self._require_finite(value)
        return (value.loss, outputs) if return_outputs else value.loss

    def _kept(self, outputs: Any, labels: Tensor | None) -> tuple[Any, Tensor | None]:
        return row_sums(outputs, _given(labels)), None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `Trainer`, token accuracy and loss for every exit, and what the gates do; no predictions are kept."""
        only_loss = self.args.prediction_loss_only
        output = Trainer.evaluation_loop(self, dataloader, description, only_loss, ignore_keys, metric_key_prefix)
        metrics = dict(output.metrics)
        if output.predictions is not None:
            values = token_metrics(output.predictions.sum(0, dtype=np.float64), self.exit_model.config.exit_layers)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        return EvalLoopOutput(None, None, metrics, output.num_samples)


def _given(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise DataError("The batch has no labels; the collator must give them.", field="labels")
    return labels


def _has_features(rows: Any) -> bool:
    if isinstance(rows, CaptionRows):
        return rows.features is not None
    return FEATURES in (getattr(rows, "column_names", None) or ())
