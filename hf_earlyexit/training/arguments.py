"""Settings of a training run with exits."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..errors import TrainingError
from ..losses import OBJECTIVES, Objective
from ..values import is_real, unexpected
from .metrics import EXIT_METRICS


@dataclass
class EarlyExitTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and what the exits learn.

    Args:
        objective: "weighted" (labels at every exit), "distillation" (labels, and the last exit's answers), "two-stage"
            (exits only; backbone and last head frozen), or, for models that write, "layerskip" (the next word at some exits
            in turn, while layers are dropped at random).
        objective_options: fields of the objective, a dict or JSON, such as `{"weights": "uniform"}`.
        exit_metric: logged for every exit in evaluations: "accuracy", "f1", "matthews", "spearman" or "mse"; chosen by the
            problem type if `None`.

    Raises:
        TrainingError, UnknownNameError: for an objective that cannot be made.
    """

    objective: str = field(default="weighted", metadata={"help": OBJECTIVES.listed()})
    objective_options: dict[str, Any] | str | None = field(default=None, metadata={"help": "fields of the objective, JSON"})
    exit_metric: str | None = field(default=None, metadata={"help": EXIT_METRICS.listed()})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if isinstance(self.objective_options, str):
            try:
                self.objective_options = json.loads(self.objective_options)
            except json.JSONDecodeError as error:
                raise TrainingError(
                    f"objective_options is {self.objective_options!r}; expected JSON ({error}).", field="objective_options"
                ) from error
        self.make_objective()
        if self.exit_metric is not None:
            EXIT_METRICS.get(self.exit_metric)
        if not is_real(self.label_smoothing_factor, 0, 1) or self.label_smoothing_factor == 1:
            raise unexpected(
                "label_smoothing_factor", self.label_smoothing_factor, "a number from 0 to below 1", TrainingError
            )

    def make_objective(self) -> Objective:
        """The objective these arguments describe."""
        cls, options = OBJECTIVES.get(self.objective), self.objective_options or {}
        try:
            return cls(**options)  # type: ignore[arg-type]  # JSON has been read
        except TypeError as error:
            raise TrainingError(
                f"The {self.objective} objective cannot take {self.objective_options!r}: {error}.", field="objective_options"
            ) from error
