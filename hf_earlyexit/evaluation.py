"""Exits for the `evaluate` library, without anything to download."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np
from evaluate import TextClassificationEvaluator

from .errors import DataError, UsageError
from .serving.tables import plain_rows

DESCRIPTION = "Accuracy of a classifier with exits, and how many of its layers a row takes."
INPUTS = """
Args:
    predictions: class numbers, one for each row.
    references: the right ones.
    exit_layers: layer each row left after, 1 to num_layers; without them the result is the accuracy alone.
    num_layers: layers of the full model; needed with exit_layers.
Returns:
    accuracy, in [0, 1]; mean_layers; layer_speed_up: num_layers over mean_layers.
"""


class EarlyExitMetric(evaluate.Metric):
    """Accuracy, mean layers and layer speed-up.

    Raises:
        DataError: for no rows, `exit_layers` without `num_layers`, or layers out of range.

    Examples:
        >>> from hf_earlyexit.evaluation import EarlyExitMetric
        >>> EarlyExitMetric().compute(predictions=[1, 0], references=[1, 1], exit_layers=[2, 4], num_layers=6)
        {'accuracy': 0.5, 'mean_layers': 3.0, 'layer_speed_up': 2.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),  # exit_layers is no feature, as the stock evaluator does not know it
        )

    def _compute(
        self, predictions: Any, references: Any, exit_layers: Any = None, num_layers: int | None = None
    ) -> dict[str, float]:
        if not len(predictions):
            raise DataError("No rows to judge; expected at least one.", field="predictions")
        figures = {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}
        if exit_layers is None:
            return figures
        layers = np.asarray(exit_layers)
        if num_layers is None or layers.min() < 1 or layers.max() > num_layers:
            raise DataError(
                f"exit_layers run from {layers.min()} to {layers.max()}, num_layers is {num_layers}; expected layers from 1 "
                "to num_layers.",
                field="exit_layers",
            )
        return {
            **figures,
            "mean_layers": float(layers.mean()),
            "layer_speed_up": float(num_layers / layers.mean()),
        }


class EarlyExitEvaluator(TextClassificationEvaluator):
    """The stock text-classification evaluator, which also hands the layers of `hf_earlyexit.pipeline` to the metric.

    Rows may also come as a DataFrame, a table of pyarrow or columns by name.

    evaluate 0.4.6 asks every pipeline whether it is a class that transformers 5 no longer has; this evaluator does not.

    Args:
        num_layers: of the full model.

    Raises:
        UsageError: by `compute`, for anything but a pipeline with exits, and for rows that are no table.
        DataError: by `compute`, for a table without the columns that are read, or with cells that are empty.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.METRIC_KWARGS = {"num_layers": num_layers}

    def load_data(self, data: Any, subset: str | None = None, split: str | None = None) -> datasets.Dataset:
        """As in `evaluate`; columns of other tables become a data set, those of a data set stay where they are."""
        if isinstance(data, (str, datasets.Dataset)):
            return super().load_data(data, subset, split)
        columns = plain_rows(data, tuple)
        if not isinstance(columns, dict):
            raise UsageError(
                f"data is of type {type(data).__name__}; expected a data set, its name, a DataFrame or columns by name.",
                field="data",
            )
        return datasets.Dataset.from_dict(columns)

    def check_required_columns(self, data: Any, columns_names: dict[str, str]) -> None:
        """Refuse a table that lacks a column, or a row that lacks its value, by name and number."""
        for argument, name in columns_names.items():
            if name not in data.column_names:
                ids = "input_ids" in data.column_names
                hint = " Pipelines take texts, not token ids; ee.predict(model, rows) takes both." if ids else ""
                raise DataError(
                    f"data has the columns {', '.join(data.column_names)}; {argument} is {name!r}.{hint}", field=argument
                )
            empty = [row for row, value in enumerate(data[name]) if value is None]
            if empty:
                raise DataError(f"Row {empty[0]} of data has no {name}; drop the row or fill it in.", field=name)

    def prepare_pipeline(self, model_or_pipeline: Any, **kwargs: Any) -> Any:
        if getattr(model_or_pipeline, "task", None) != self.task:
            raise UsageError(
                f"Got {type(model_or_pipeline).__name__}; expected a pipeline from hf_earlyexit.pipeline(model=...).",
                field="model_or_pipeline",
            )
        return model_or_pipeline

    def predictions_processor(self, predictions: Any, label_mapping: Any) -> dict[str, Any]:
        figures = super().predictions_processor(predictions, label_mapping)
        return {**figures, "exit_layers": [answer["exit_layer"] for answer in predictions]}
