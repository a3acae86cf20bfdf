"""Train a real 12-layer BERT with 12 exits on a task, once per seed, and keep its traces.

    python benchmarks/train_exits.py sst2 rte --out build/glue

writes OUT/<task>-<seed>/: the model, train.json (recipe and wall time), held-back.safetensors and report.safetensors.
A run that is already there is left as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from tasks import BACKBONE, DATA, TASKS, Task, load_rows
from transformers import AutoTokenizer, set_seed

import hf_earlyexit as ee
from hf_earlyexit.inference.rows import text_columns


def train(name: str, task: Task, seed: int, out: Path, objective: str, options: dict, bf16: bool) -> None:
    rows = load_rows(task)
    tokenizer = AutoTokenizer.from_pretrained(DATA / BACKBONE)
    columns = text_columns(rows["train"].column_names)
    encoded = {
        split: part.map(
            lambda batch: tokenizer(*(batch[c] for c in columns), truncation=True, max_length=task.max_length), batched=True
        ).remove_columns(list(columns))
        for split, part in rows.items()
    }
    set_seed(seed)
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(
        DATA / BACKBONE, num_labels=len(set(rows["train"]["label"])), dtype=torch.float32
    )
    args = ee.EarlyExitTrainingArguments(
        output_dir=str(out),
        objective=objective,
        objective_options=options,
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
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = ee.EarlyExitTrainer(model=model, args=args, train_dataset=encoded["train"], processing_class=tokenizer)
    start = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - start) / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for split in ("held-back", "report"):
        ee.collect_trace(model, encoded[split], tokenizer=tokenizer, split=split).save(out / f"{split}.safetensors")
    recipe = {
        "task": name, "seed": seed, "backbone": BACKBONE, "objective": objective, "objective_options": options,
        "epochs": task.epochs, "batch_size": task.batch_size, "learning_rate": task.learning_rate,
        "exit_head": model.config.exit_head, "train_rows": len(rows["train"]), "held_back_rows": len(rows["held-back"]),
        "report_rows": len(rows["report"]), "report_split": task.report,
        "autocast": "bfloat16" if bf16 else None, "minutes": round(minutes, 1),
    }  # fmt: skip
    (out / "train.json").write_text(json.dumps(recipe, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--out", type=Path, default=Path("build/glue"))
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the task's own")
    parser.add_argument("--objective", default="distillation")
    parser.add_argument("--objective-options", type=json.loads, default={})
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast; traces are float32 all the same")
    args = parser.parse_args()
    for name in args.tasks:
        for seed in args.seeds or TASKS[name].seeds:
            out = args.out / f"{name}-{seed}"
            if not (out / "train.json").exists():
                train(name, TASKS[name], seed, out, args.objective, args.objective_options, args.bf16)


if __name__ == "__main__":
    main()
