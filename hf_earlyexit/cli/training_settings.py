"""The settings of training as flags: --label_names names classes here, which Trainer means otherwise and has no need of."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..training import ConsistentTrainingArguments, EarlyExitTrainingArguments


@dataclass
class TrainSettings(EarlyExitTrainingArguments):
    """All of its settings but Trainer's own `label_names`, columns of labels, of which there is one here."""

    label_names: list[str] | None = field(default=None, init=False)


@dataclass
class ConsistentSettings(ConsistentTrainingArguments):
    """As `TrainSettings`."""

    label_names: list[str] | None = field(default=None, init=False)
