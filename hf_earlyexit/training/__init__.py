"""Training models with exits through transformers' Trainer."""

from .arguments import EarlyExitTrainingArguments
from .trainer import EarlyExitTrainer

__all__ = ["EarlyExitTrainer", "EarlyExitTrainingArguments"]
