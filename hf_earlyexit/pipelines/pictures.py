"""The pipeline of image classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from transformers import ImageClassificationPipeline

from ..serving.pictures import encode_picture, picture_columns
from ..serving.reader import PICTURES
from ..serving.tables import PIXELS, plain_rows
from .engine import Rows, ThroughEngine


class EarlyExitImageClassificationPipeline(ThroughEngine, ImageClassificationPipeline):  # type: ignore[misc]
    """The stock pipeline whose every answer also tells `exit_layer` (1 to L) and `exit_score`.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use, `early_exit`, `False` for
    the full model, and `cuda_graphs`, as `predict` does; further `top_k` and `function_to_apply`. Others are refused.
    Pictures are all that `predict` takes: files, PIL images, arrays of bytes, and data sets or columns by name.

    Lists and data sets run through the engine of `predict`, one picture at a time in memory and batch, and a generator is
    read row by row, or `window` rows at a time. With `batch_size`, batches of so many pictures go through `forward`.

    Raises:
        UsageError: for an option that the pipeline does not take, and for a model without an image processor.
        DataError: for what is no picture, naming the row, or has an answer that is not finite.
    """

    window = PICTURES

    def taken(self) -> set[str]:
        """Names of the options of the stock pipeline that are taken."""
        return {"top_k", "function_to_apply"}

    def rows_of(self, inputs: Any) -> Any:
        """Rows of a table or data set where one is given; anything else as it is."""
        return picture_rows(inputs)

    def encoded(self, row: Any, number: int, options: dict[str, Any]) -> Mapping[str, Any]:
        """Pixel values of one picture."""
        return {PIXELS: encode_picture(row, self.image_processor, f"Row {number}")}

    def preprocess(self, image: Any) -> Any:  # type: ignore[override]
        """Pixel values `[1, channels, height, width]`."""
        return {PIXELS: encode_picture(image, self.image_processor, "The row")[None].to(self.dtype)}


def picture_rows(inputs: Any) -> Any:
    """What a pipeline of pictures takes, from whatever it is given.

    Args:
        inputs: a picture or several; a data set, DataFrame or columns by name with one of the usual columns of pictures.

    Returns:
        Of tables a list of rows, `Rows` or, for one without length, a generator; anything else as it is.

    Raises:
        DataError: for a table without such a column.
    """
    if isinstance(inputs, tuple):
        return list(inputs)
    table = hasattr(inputs, "column_names") or hasattr(inputs, "columns")
    if not table and not (isinstance(inputs, Mapping) and _is_table(inputs)):
        return inputs
    rows = plain_rows(inputs, picture_columns)
    if isinstance(rows, dict):
        (name,) = picture_columns(rows)
        return [{name: picture} for picture in rows[name]]
    return Rows(rows) if hasattr(rows, "__len__") else (row for row in rows)


def _is_table(inputs: Mapping[str, Any]) -> bool:
    """Whether values are columns, and not those of one row."""
    if {"bytes", "path"} & set(inputs):
        return False
    (name,) = picture_columns(inputs)
    values = inputs[name]
    if hasattr(values, "ndim"):
        return bool(values.ndim > 3)
    return hasattr(values, "__len__") and not isinstance(values, (str, bytes, PathLike, Mapping))
