"""The pipeline of text classifiers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import TextClassificationPipeline

from ..errors import DataError, UsageError
from ..serving.predict import WINDOW
from ..serving.rows import ReadRow
from ..serving.tables import MODEL_COLUMNS, windows
from .engine import ThroughEngine

TOKENIZING = {"split_special_tokens"}  # taken by tokenizers without being among their named arguments
NOT_TOKENIZING = {"self", "text", "text_pair", "text_target", "text_pair_target", "return_tensors",
                  "return_overflowing_tokens", "is_split_into_words", "kwargs"}  # fmt: skip


class EarlyExitTextClassificationPipeline(ThroughEngine, TextClassificationPipeline):  # type: ignore[misc]
    """The stock pipeline whose every answer also tells `exit_layer` (1 to L) and `exit_score`.

    Takes, when it is made and when it is called, `operating_point`, the name of the policy to use, `early_exit`, `False` for
    the full model, and `cuda_graphs`, as `predict` does; further `top_k`, `function_to_apply` and what the tokenizer takes.
    Any other option is refused. DataFrames, columns by name and data sets with texts are rows, as in `predict`.

    Lists and data sets run through the engine of `predict`, and a generator is read row by row, so that whoever waits for an
    answer before giving the next row gets it; `window` says how many rows are read before the first of them is answered,
    so that a generator runs in the batches of a list. With `batch_size`, batches of so many rows, in the order they come, go
    through `forward`: the answers are then those of the stock pipeline, to the bit.

    Raises:
        UsageError: for an option that neither the pipeline nor the tokenizer takes, and for token ids in place of texts.
        DataError: for a row that is no text and no pair of texts, or whose answer is not finite.
    """

    window = WINDOW
    tokenizer: Any

    def taken(self) -> set[str]:
        """Names of the options of the stock pipeline that are taken."""
        known = {"top_k", "function_to_apply"} | TOKENIZING
        if self.tokenizer is not None:
            known |= set(inspect.signature(type(self.tokenizer).__call__).parameters) - NOT_TOKENIZING
        return known

    def rows_of(self, inputs: Any) -> Any:
        """Texts and pairs where whole columns are given; anything else as it is."""
        named = isinstance(inputs, Mapping) and not all(isinstance(part, str) for part in inputs.values())
        if not (named or hasattr(inputs, "column_names") or hasattr(inputs, "columns")):
            return inputs
        return [_text_of(row) for window in windows(inputs, WINDOW) for row in window]

    def encoded(self, row: Any, number: int, options: dict[str, Any]) -> Mapping[str, Any]:
        """Token ids of one text or pair."""
        values = self.preprocess(row, **options)
        return {name: values[name][0].tolist() for name in values if name in MODEL_COLUMNS}

    def encoded_rows(self, rows: list[Any], first: int, options: dict[str, Any]) -> Iterable[Mapping[str, Any]]:
        """Token ids of several texts, by one call of the tokenizer where nothing speaks against it."""
        one_by_one = super().encoded_rows(rows, first, options)
        if len(rows) == 1 or "padding" in options or not all(isinstance(row, str) for row in rows):
            return one_by_one
        try:
            columns = self.tokenizer(rows, **options)
        except Exception:  # whose fault it is comes out row by row
            return one_by_one
        names = [name for name in columns if name in MODEL_COLUMNS]
        return [ReadRow(zip(names, values, strict=True)) for values in zip(*(columns[name] for name in names), strict=True)]

    def preprocess(self, inputs: Any, **tokenizer_kwargs: Any) -> Any:  # type: ignore[override]
        if isinstance(inputs, (list, tuple)) and len(inputs) == 2 and all(isinstance(part, str) for part in inputs):
            inputs = {"text": inputs[0], "text_pair": inputs[1]}
        if isinstance(inputs, Mapping) and inputs.get("text_pair", "") is None:  # as `evaluate` gives one text
            inputs = {name: part for name, part in inputs.items() if name != "text_pair"}
        legacy = isinstance(inputs, list) and len(inputs) == 1 and isinstance(inputs[0], list)
        pair = isinstance(inputs, Mapping) and "text" in inputs and set(inputs) <= {"text", "text_pair"}
        if not (isinstance(inputs, str) or legacy or (pair and all(isinstance(part, str) for part in inputs.values()))):
            raise DataError(
                f'A row is {repr(inputs)[:80]}; expected a text, or {{"text": ..., "text_pair": ...}} for a pair.',
                field="inputs",
                value=inputs,
            )
        return super().preprocess(inputs, **tokenizer_kwargs)


def _text_of(row: Any) -> Any:
    if isinstance(row, Mapping):
        raise UsageError("A pipeline takes texts, not token ids; predict(model, rows) takes both.", field="inputs")
    return {"text": row[0], "text_pair": row[1]} if isinstance(row, tuple) else row
