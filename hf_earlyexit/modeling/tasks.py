"""What classifiers do, by the names of transformers' pipelines."""

from __future__ import annotations

from typing import NamedTuple

from ..families.base import IMAGE, TEXT
from .classifier import EarlyExitClassifier, EarlyExitImageClassifier, EarlyExitTextClassifier


class Task(NamedTuple):
    """A task of classifiers.

    Attributes:
        suffix: of the stock classes' names.
        auto_model: name of the Auto class that loads them.
        mixin: what gives a stock class of this task its exits.
    """

    suffix: str
    auto_model: str
    mixin: type[EarlyExitClassifier]


TASKS = {
    TEXT: Task("ForSequenceClassification", "AutoModelForSequenceClassification", EarlyExitTextClassifier),
    IMAGE: Task("ForImageClassification", "AutoModelForImageClassification", EarlyExitImageClassifier),
}
