"""Training models with exits through transformers' Trainer."""

from .arguments import EarlyExitTrainingArguments
from .consistent import ConsistentTrainer
from .consistent_arguments import ConsistentTrainingArguments
from .hardness import HARDNESS, HardnessTable
from .trainer import EarlyExitTrainer

__all__ = [
    "HARDNESS",
    "ConsistentTrainer",
    "ConsistentTrainingArguments",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "HardnessTable",
]
