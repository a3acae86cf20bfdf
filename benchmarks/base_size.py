"""Exits on another family of base size: all-mpnet-base-v2 (12 x 768), taught with the network and added to a finished one.

    python benchmarks/base_size.py BACKBONE --out build/base-size   # BACKBONE: a folder with all-mpnet-base-v2
    python benchmarks/base_size_page.py build/base-size             # results and page, from the traces

trains, for each task, one model whose exits learn with everything else ("joint"), and one that the stock Trainer fine-tunes
as a plain classifier (its upper half) before its exits learn on the frozen network ("two-stage"). Writes to
OUT/<task>-<mode>/ the model, train.json, held-back.safetensors and report.safetensors; what is there is left as it is. One
core takes a bit more than a second for a step of 32 rows under bfloat16 autocast: some hours in all. One epoch is too few
for the intents: the last head reads the first token, which this network was never taught to answer from, and is behind the
exits until it has learned to.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tasks import Task
from train_exits import encode
from transformers import AutoTokenizer, MPNetForSequenceClassification, Trainer, TrainingArguments, set_seed

import hf_earlyexit as ee

TASKS = {
    "banking77": Task("banking77", 1000, "test", 3, max_length=64, learning_rate=1e-4),
    "clinc150": Task("clinc150", "dev", "test", 3, max_length=64, learning_rate=1e-4),
    "sst2": Task("sst2", 3000, "dev", 1, max_length=64),
}
MODES = ("joint", "two-stage")
TRAIN_ROWS = {"joint": 16_000, "two-stage": 8_000}  # at most, drawn at random
FROZEN = 6  # lower layers that stay as they are while the plain classifier is fine-tuned, which spares their way back
EXITS = {"num_train_epochs": 1, "learning_rate": 1e-3}  # of the second stage


def settings(task: Task, out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "num_train_epochs": task.epochs,
        "per_device_train_batch_size": task.batch_size,
        "learning_rate": task.learning_rate,
        "warmup_steps": 0.06,
        "weight_decay": 0.01,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": [],
        "seed": 0,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
    }


def fit(mode: str, backbone: str, task: Task, rows: Any, classes: int, out: Path, tokenizer: Any) -> Any:
    """A model whose exits learned from these rows."""
    set_seed(0)
    options, data = settings(task, out), {"train_dataset": rows, "processing_class": tokenizer}
    if mode == "joint":
        model = ee.from_pretrained(backbone, task="text-classification", num_labels=classes)
        args = ee.EarlyExitTrainingArguments(objective="distillation", **options)
        ee.EarlyExitTrainer(model=model, args=args, **data).train()
        return model
    plain = MPNetForSequenceClassification.from_pretrained(backbone, num_labels=classes)
    for part in (plain.mpnet.embeddings, *plain.mpnet.encoder.layer[:FROZEN]):
        part.requires_grad_(False)
    Trainer(model=plain, args=TrainingArguments(**options), **data).train()
    plain.save_pretrained(out / "plain")
    model = ee.from_pretrained(out / "plain")
    args = ee.EarlyExitTrainingArguments(objective="two-stage", **options | EXITS)
    ee.EarlyExitTrainer(model=model, args=args, **data).train()
    return model


def run(name: str, mode: str, backbone: str, out: Path) -> None:
    task = TASKS[name]
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    rows = encode(task, tokenizer)
    train = rows["train"].shuffle(seed=0).select(range(min(TRAIN_ROWS[mode], len(rows["train"]))))
    start = time.perf_counter()
    model = fit(mode, backbone, task, train, len(set(rows["train"]["label"])), out, tokenizer)
    minutes = (time.perf_counter() - start) / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    model = ee.from_pretrained(out)
    for split in ("held-back", "report"):
        ee.collect_trace(model, rows[split], tokenizer=tokenizer, split=split).save(out / f"{split}.safetensors")
    recipe = {
        "task": name, "mode": mode, "epochs": task.epochs, "batch_size": task.batch_size,
        "learning_rate": task.learning_rate, "train_rows": len(train), "frozen_layers": 0 if mode == "joint" else FROZEN,
        "held_back_rows": len(rows["held-back"]),
        "report_rows": len(rows["report"]), "report_split": task.report, "minutes": round(minutes, 1),
    }  # fmt: skip
    (out / "train.json").write_text(json.dumps(recipe, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--out", type=Path, default=Path("build/base-size"))
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    for mode in args.modes:
        for name in args.tasks:
            out = args.out / f"{name}-{mode}"
            if not (out / "train.json").exists():
                run(name, mode, args.backbone, out)


if __name__ == "__main__":
    main()
