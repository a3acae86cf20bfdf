"""Train a real 12-layer BERT with 12 exits on a task, once per seed, and keep its traces.

    python benchmarks/train_exits.py sst2 rte --out build/glue
    python benchmarks/train_exits.py mrpc --out build/glue --folds 2

writes OUT/<task>-<seed>/: the model, train.json (recipe and wall time), held-back.safetensors and report.safetensors.
A run that is already there is left as it is. With `--folds K`, K more models each leave out their share of the train rows,
and OUT/<task>-<seed>/cross-hardness.safetensors tells how hard each row is for the model that never saw it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from tasks import BACKBONE, DATA, TASKS, Task, load_rows
from transformers import AutoTokenizer, set_seed

import hf_earlyexit as ee
from hf_earlyexit.serving.tables import text_columns

CROSS_HARDNESS = "cross-hardness.safetensors"


def encode(task: Task, tokenizer: Any) -> dict[str, datasets.Dataset]:
    """Every split as token ids and labels."""
    rows = load_rows(task)
    columns = text_columns(rows["train"].column_names)
    return {
        split: part.map(
            lambda batch: tokenizer(*(batch[c] for c in columns), truncation=True, max_length=task.max_length), batched=True
        ).remove_columns(list(columns))
        for split, part in rows.items()
    }


def fit(
    task: Task, rows: datasets.Dataset, classes: int, seed: int, out: Path, tokenizer: Any, options: argparse.Namespace
) -> Any:
    """A model whose exits learned from these rows."""
    set_seed(seed)
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(
        DATA / BACKBONE, num_labels=classes, dtype=torch.float32
    )
    args = ee.EarlyExitTrainingArguments(
        output_dir=str(out),
        objective=options.objective,
        objective_options=options.objective_options,
        num_train_epochs=task.epochs,
        per_device_train_batch_size=task.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=task.learning_rate,
        warmup_steps=0.06,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        seed=seed,
        bf16=options.bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    ee.EarlyExitTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer).train()
    return model


def train(name: str, task: Task, seed: int, out: Path, options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DATA / BACKBONE)
    encoded = encode(task, tokenizer)
    start = time.perf_counter()
    model = fit(task, encoded["train"], len(set(encoded["train"]["label"])), seed, out, tokenizer, options)
    minutes = (time.perf_counter() - start) / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for split in ("held-back", "report"):
        ee.collect_trace(model, encoded[split], tokenizer=tokenizer, split=split).save(out / f"{split}.safetensors")
    recipe = {
        "task": name, "seed": seed, "backbone": BACKBONE, "objective": options.objective,
        "objective_options": options.objective_options, "epochs": task.epochs, "batch_size": task.batch_size,
        "learning_rate": task.learning_rate, "exit_head": model.config.exit_head, "train_rows": len(encoded["train"]),
        "held_back_rows": len(encoded["held-back"]), "report_rows": len(encoded["report"]), "report_split": task.report,
        "autocast": "bfloat16" if options.bf16 else None, "minutes": round(minutes, 1),
    }  # fmt: skip
    (out / "train.json").write_text(json.dumps(recipe, indent=1) + "\n")


def cross_hardness(task: Task, seed: int, out: Path, options: argparse.Namespace) -> None:
    """Hardness of each train row, by its number, for a model trained on the other folds."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / BACKBONE)
    rows, tables = encode(task, tokenizer)["train"], []
    for fold in range(options.folds):
        fold_rows = list(range(fold, len(rows), options.folds))
        others = rows.select(sorted(set(range(len(rows))) - set(fold_rows)))
        model = fit(task, others, len(set(rows["label"])), seed, out, tokenizer, options)
        trace = ee.collect_trace(model, rows.select(fold_rows), tokenizer=tokenizer, split="other fold")
        tables.append(ee.training.HardnessTable.measured(trace, fold_rows))
    ee.training.HardnessTable.joined(tables).save(out / CROSS_HARDNESS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=Path("build/glue"))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the task's own")
    parser.add_argument("--objective", default="distillation")
    parser.add_argument("--objective-options", type=json.loads, default={})
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; traces are float32 all the same")
    parser.add_argument("--folds", type=int, help="also measure hardness by so many models")
    args = parser.parse_args()
    for name in args.tasks:
        for seed in args.seeds or TASKS[name].seeds:
            out = args.out / f"{name}-{seed}"
            if not (out / "train.json").exists():
                train(name, TASKS[name], seed, out, args)
            if args.folds and not (out / CROSS_HARDNESS).exists():
                cross_hardness(TASKS[name], seed, out, args)


if __name__ == "__main__":
    main()
