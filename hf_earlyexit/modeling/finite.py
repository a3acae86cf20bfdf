"""Answers that are no numbers, and the error of their rows."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..errors import DataError


def check_finite(logits: Tensor, numbers: Sequence[int]) -> None:
    """Refuse answers that are not finite.

    Args:
        logits: `[B, ...]`.
        numbers: of the rows, for the error.

    Raises:
        DataError: naming the first such row.
    """
    finite = logits.isfinite()
    if not bool(finite.all()):
        raise not_finite(numbers[finite.flatten(1).all(1).tolist().index(False)])


def not_finite(number: int) -> DataError:
    """The error of a row whose answer is no number."""
    return DataError(
        f"Row {number} has an answer that is not finite: the model's weights hold such values, or its dtype is too narrow "
        "for this row. Check the weights, or load the model in float32.",
        field="logits",
    )
