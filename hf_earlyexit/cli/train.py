"""Fine-tune a model with exits on a data set.

Rows held back from training are run through the trained model once; the trace is saved beside it for `calibrate`.

    hf-earlyexit train --model bert-base-uncased --dataset reviews --output_dir bert-with-exits
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer, set_seed

from ..doors import from_pretrained
from ..modeling.heads import HEADS
from ..serving.collect import collect_trace
from ..training import EarlyExitTrainer, EarlyExitTrainingArguments
from ..training.data import encode, hold_back, label_names, load_splits, require_split, with_ids
from .answer import Answer

TRACE_FILE = "held-back.safetensors"


@dataclass
class TrainArguments:
    """What is trained on what."""

    model: str = field(metadata={"help": "folder or Hub id of a BERT checkpoint"})
    dataset: str = field(metadata={"help": "folder with one file per split, a file, or a Hub id"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    held_back: str = field(default="0.1", metadata={"help": "share of the train split, or name of a split, for thresholds"})
    exit_layers: list[int] | None = field(default=None, metadata={"help": "layers with an exit; all by default"})
    exit_head: str = field(default="linear-mean", metadata={"help": HEADS.listed()})
    max_length: int = field(default=128, metadata={"help": "tokens of a text"})


ARGUMENTS = (TrainArguments, EarlyExitTrainingArguments)


def run(args: TrainArguments, training: EarlyExitTrainingArguments) -> Answer:
    """Train, save, trace."""
    model, tokenizer, train, held = prepare(args, training.seed)
    trainer = EarlyExitTrainer(model, training, train_dataset=train, eval_dataset=held, processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trace = Path(training.output_dir) / TRACE_FILE
    collect_trace(model, held, tokenizer=tokenizer).save(trace)
    metrics = trainer.evaluate()
    by_layer = sorted((key for key in metrics if "_exit_" in key), key=lambda key: int(key.split("_")[2]))
    lines = [f"{name.removeprefix('eval_'):20s} {metrics[name]:.4f}" for name in by_layer]
    lines.append(f"saved {training.output_dir}; next: hf-earlyexit calibrate --model {training.output_dir}")
    values = {"model": training.output_dir, "held_back": str(trace), "steps": trainer.state.global_step, "metrics": metrics}
    return Answer(values, "\n".join(lines))


def prepare(
    args: TrainArguments, seed: int, id_column: str | None = None, **fields: Any
) -> tuple[Any, Any, datasets.Dataset, datasets.Dataset]:
    """Model, tokenizer, encoded training rows and encoded held-back rows.

    Args:
        args: which.
        seed: of the split and of what is new in the model.
        id_column: kept, or made where it is absent.
        fields: given to `from_pretrained`.
    """
    splits = load_splits(args.dataset)
    train = require_split(splits, args.train_split, args.dataset)
    if id_column is not None:
        train = with_ids(train, id_column)
    if args.held_back.replace(".", "", 1).isdigit():
        train, held = hold_back(train, float(args.held_back), seed)
    else:
        held = require_split(splits, args.held_back, args.dataset)
    names = label_names(train)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    set_seed(seed)
    labels = {"num_labels": 1} if names is None else {
        "id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}
    }  # fmt: skip
    model = from_pretrained(
        args.model, dtype=torch.float32, exit_layers=args.exit_layers, exit_head=args.exit_head, **labels, **fields
    )
    keep = () if id_column is None else (id_column,)
    return model, tokenizer, encode(train, tokenizer, args.max_length, keep), encode(held, tokenizer, args.max_length)
