"""Let models of train_exits.py learn by reward: gates, then the exits at which rows leave, in turn.

    python benchmarks/train_chosen.py build/glue/rte-0 build/glue/mrpc-0 --out build/chosen

writes OUT/<task>-<seed>/: the model after all phases, and train.json (recipe, the log of every phase, wall time). A run that
is already there is left as it is. consistentee.py compares it with gates on the network held still.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from tasks import TASKS, load_rows
from transformers import AutoTokenizer, set_seed

import hf_earlyexit as ee
from hf_earlyexit.inference.rows import text_columns

LOGGED = ("phase", "gate_quality", "gate_layers", "gate_reward", "exit_12_quality")


def train(start: Path, out: Path, settings: dict) -> None:
    name, seed = start.name.rsplit("-", 1)
    task = TASKS[name]
    rows = load_rows(task)
    tokenizer = AutoTokenizer.from_pretrained(start)
    columns = text_columns(rows["train"].column_names)
    encoded = {}
    for split in ("train", "held-back"):
        part = rows[split].add_column("row", range(len(rows[split])))
        encoded[split] = part.map(
            lambda batch: tokenizer(*(batch[c] for c in columns), truncation=True, max_length=task.max_length), batched=True
        ).remove_columns(list(columns))
    set_seed(int(seed))
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(
        start, exit_gate="mlp", init_missing_exits=True, dtype=torch.float32
    )
    recipe = {
        "alpha": 0.02, "estimator": "reinforce", "hardness": "memorized", "chosen_phase": "alternate", "chosen_epochs": 1.0,
        "chosen_learning_rate": 2e-5, "rounds": 2, "gate_epochs": max(3, round(24_000 / len(encoded["train"]))),
        "gate_learning_rate": 1e-3, "gate_batch_size": 64, **settings,
    }  # fmt: skip
    args = ee.ConsistentTrainingArguments(
        output_dir=str(out / "run"),
        exits_trained=True,
        id_column="row",
        per_device_train_batch_size=task.batch_size,
        train_sampling_strategy="group_by_length",
        warmup_steps=0.06,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=int(seed),
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        **recipe,
    )
    trainer = ee.ConsistentTrainer(model, args, encoded["train"], encoded["held-back"], processing_class=tokenizer)
    begin = time.perf_counter()
    log = trainer.train()
    minutes = (time.perf_counter() - begin) / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "run")
    told = [{key: entry[key] for key in LOGGED} for entry in log if "exit_12_quality" in entry]  # the end of each phase
    values = {"start": start.name, "autocast": "bfloat16", "minutes": round(minutes, 1), "recipe": recipe, "log": told}
    (out / "train.json").write_text(json.dumps(values, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of train_exits.py")
    parser.add_argument("--out", type=Path, default=Path("build/chosen"))
    parser.add_argument("--settings", type=json.loads, default={}, help="of ConsistentTrainingArguments, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for start in args.models:
        out = args.out / start.name
        if not (out / "train.json").exists():
            train(start, out, args.settings)


if __name__ == "__main__":
    main()
