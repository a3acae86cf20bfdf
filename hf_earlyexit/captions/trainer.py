"""Trainer that teaches every exit of a captioner, and reports on each of them token by token."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modeling.protocol import TorchExitModel
from ..training.token_trainer import LABELS, TokenTrainer, require_labels
from .batches import FEATURES
from .data import CaptionCollator, CaptionRows, check_caption_rows
from .model import EarlyExitVisionEncoderDecoder


class EarlyExitCaptioningTrainer(TokenTrainer):
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
    writes = "captions"

    def _usual_collator(self) -> CaptionCollator:
        return CaptionCollator()

    def _check_rows(self, rows: Any, name: str, needed: bool = True) -> None:
        check_caption_rows(rows, name, self.exit_model.config.decoder.vocab_size)

    def _freeze_more(self, model: TorchExitModel) -> None:
        encoder = model.get_submodule("encoder")
        if _has_features(self.train_dataset):
            encoder.requires_grad_(False)
        pooler = getattr(encoder, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # its answer is not used

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns.extend(name for name in (FEATURES, "decoder_position_ids") if name not in columns)

    def _truth(self, labels: Tensor | None) -> Tensor:
        return require_labels(labels)

    def _given(self, inputs: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in inputs.items() if name != LABELS}
        if "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self.exit_model.prepare_decoder_input_ids_from_labels(  # type: ignore[attr-defined]  # a captioner
                inputs[LABELS]
            )
        return given


def _has_features(rows: Any) -> bool:
    if isinstance(rows, CaptionRows):
        return rows.features is not None
    return FEATURES in (getattr(rows, "column_names", None) or ())
