"""Training models with exits through transformers' Trainer."""

from .arguments import EarlyExitTrainingArguments
from .caption_data import CaptionCollator, CaptionRows
from .captioning import EarlyExitCaptioningTrainer
from .consistent import ConsistentTrainer
from .consistent_arguments import ConsistentTrainingArguments
from .hardness import HARDNESS, HardnessTable
from .trainer import EarlyExitTrainer

__all__ = [
    "HARDNESS",
    "CaptionCollator",
    "CaptionRows",
    "ConsistentTrainer",
    "ConsistentTrainingArguments",
    "EarlyExitCaptioningTrainer",
    "EarlyExitTrainer",
    "EarlyExitTrainingArguments",
    "HardnessTable",
]
