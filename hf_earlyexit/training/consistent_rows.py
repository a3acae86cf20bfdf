"""What a run in which exits are learned by reward does with a classifier: each row leaves once."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..modeling.protocol import TorchExitClassifier
from ..serving.collect import collect_trace
from ..serving.reader import reads_images
from .chosen import HARDNESS_COLUMN, KEY_COLUMN, ChosenExitTrainer
from .consistent_arguments import ConsistentTrainingArguments
from .consistent_data import checked_rows, row_ids
from .gate_report import gate_metrics
from .hardness import ExampleId
from .outcomes import Outcomes
from .states import GateStates, collect_states
from .trainer import EarlyExitTrainer


class RowLessons:
    """Rows of a classifier: what gates and exits learn from.

    Args:
        model: with gates.
        args: of the run.
        processing_class: the tokenizer or image processor.
    """

    trainer: type = EarlyExitTrainer
    chosen_trainer: type = ChosenExitTrainer

    def __init__(self, model: TorchExitClassifier, args: ConsistentTrainingArguments, processing_class: Any) -> None:
        self.model, self.args = model, args
        self.reading: dict[str, Any] = {"progress": not args.disable_tqdm}
        if reads_images(model):
            self.reading["image_processor"] = processing_class

    def checked(self, rows: Any, name: str) -> Any:
        """The same rows, looked through: see `checked_rows`."""
        return checked_rows(rows, name, self.model.config, self.args.label_names or ())

    def ids(self, rows: Any) -> tuple[ExampleId, ...]:
        """The id of each row."""
        return row_ids(rows, self.args.id_column)

    def outcomes(self, rows: Any) -> Outcomes:
        """How every exit fares on each row."""
        return Outcomes.of(collect_trace(self.model, rows, **self.reading, split="train"))

    def states(self, rows: Any, places: Tensor | None = None, split: str = "train") -> GateStates:
        """What the gates see of some rows, or of all."""
        chosen = rows if places is None else rows.select(places.tolist())
        return collect_states(self.model, chosen, **self.reading, split=split)

    def with_hardness(self, rows: Any, hardness: Tensor, keys: Tensor) -> Any:
        """Rows with the columns that the last phase reads, from hardness and keys `[N]`."""
        return rows.add_column(HARDNESS_COLUMN, hardness.numpy()).add_column(KEY_COLUMN, keys.numpy())

    def report(self, rows: Any) -> dict[str, float]:
        """Quality of every exit, and what the gates do."""
        trace = collect_trace(self.model, rows, **self.reading, split="eval")
        each = zip(trace.exit_layers, trace.quality.mean(0).tolist(), strict=True)
        metrics = gate_metrics(trace, self.args.make_consistent_objective(), self.args.hardness)
        return {f"exit_{layer}_quality": quality for layer, quality in each} | metrics
