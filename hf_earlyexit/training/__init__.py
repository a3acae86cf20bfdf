"""Training models with exits through transformers' Trainer."""

from ..lazy import lazy_names
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

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
