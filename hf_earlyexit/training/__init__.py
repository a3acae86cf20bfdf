"""Training models with exits through transformers' Trainer."""

from typing import Any

from ..lazy import load
from .arguments import EarlyExitTrainingArguments
from .consistent import ConsistentTrainer
from .consistent_arguments import ConsistentTrainingArguments
from .hardness import HARDNESS, HardnessTable
from .trainer import EarlyExitTrainer

_HOMES = dict.fromkeys(("EarlyExitLanguageModelTrainer", "TokenCollator", "pack_texts"), "language_model")

__all__ = [
    "HARDNESS",
    "ConsistentTrainer",
    "ConsistentTrainingArguments",
    "EarlyExitLanguageModelTrainer",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "HardnessTable",
    "TokenCollator",
    "pack_texts",
]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
