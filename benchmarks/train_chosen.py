"""Let models of train_exits.py learn by reward: gates, then the exits at which rows leave, in turn.

    python benchmarks/train_chosen.py build/glue/rte-0 build/glue/mrpc-0 --out build/chosen
    python benchmarks/train_chosen.py build/glue/rte-0 build/glue/mrpc-0 --out build/control --control

writes OUT/<task>-<seed>/: the model after all phases, and train.json (recipe, the log of every phase, wall time). A run that
is already there is left as it is. `--control` trains the same start as long, as fast and on the same rows in the same order,
but all exits with the objective it started with, and no gates. consistentee.py compares both, and gates on the network held
still.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tasks import TASKS, load_rows
from transformers import AutoTokenizer, set_seed

import hf_earlyexit as ee
from hf_earlyexit.serving.tables import text_columns

LOGGED = ("phase", "gate_quality", "gate_layers", "gate_reward", "exit_12_quality")
LOGGED_ROWS = 1000  # held-back rows for the log, which decides nothing


def train(start: Path, out: Path, most_rows: int, control: bool, settings: dict) -> None:
    name, seed = start.name.rsplit("-", 1)
    task = TASKS[name]
    rows = load_rows(task)
    began = json.loads((start / "train.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(start)
    columns = text_columns(rows["train"].column_names)
    encoded = {}
    for split in ("train", "held-back"):
        part = rows[split].add_column("row", range(len(rows[split])))
        most = most_rows if split == "train" else LOGGED_ROWS
        if len(part) > most:
            part = part.shuffle(seed=1).select(range(most))
        encoded[split] = part.map(
            lambda batch: tokenizer(*(batch[c] for c in columns), truncation=True, max_length=task.max_length), batched=True
        ).remove_columns(list(columns))
    set_seed(int(seed))
    gates = {} if control else {"exit_gate": "mlp", "init_missing_exits": True}
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(start, dtype=torch.float32, **gates)
    recipe = {
        "alpha": 0.02, "estimator": "reinforce", "hardness": "memorized", "chosen_phase": "alternate", "chosen_epochs": 1.0,
        "chosen_learning_rate": 2e-5, "rounds": 2, "gate_epochs": max(3, round(24_000 / len(encoded["train"]))),
        "gate_learning_rate": 1e-3, "gate_batch_size": 64, **settings,
    }  # fmt: skip
    args = ee.ConsistentTrainingArguments(
        output_dir=str(out / "run"),
        exits_trained=True,
        id_column="row",
        objective=began["objective"],
        objective_options=began["objective_options"],
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
    begin = time.perf_counter()
    log = (train_all_exits if control else train_by_reward)(model, args, encoded, tokenizer)
    minutes = (time.perf_counter() - begin) / 60
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "run", ignore_errors=True)  # a control leaves none
    values = {
        "start": start.name, "control": control, "train_rows": len(encoded["train"]), "objective": began["objective"],
        "autocast": "bfloat16", "minutes": round(minutes, 1), "recipe": recipe, "log": log,
    }  # fmt: skip
    (out / "train.json").write_text(json.dumps(values, indent=1) + "\n")


def train_by_reward(model: Any, args: ee.ConsistentTrainingArguments, encoded: dict, tokenizer: Any) -> list[dict]:
    """All phases; what was logged at the end of each."""
    trainer = ee.ConsistentTrainer(model, args, encoded["train"], encoded["held-back"], processing_class=tokenizer)
    return [{key: entry[key] for key in LOGGED} for entry in trainer.train() if "exit_12_quality" in entry]


def train_all_exits(model: Any, args: ee.ConsistentTrainingArguments, encoded: dict, tokenizer: Any) -> list[dict]:
    """The phases of chosen exits with the loss of all exits instead; seeds as `ConsistentTrainer` numbers them."""
    args.num_train_epochs, args.learning_rate, seed = args.chosen_epochs, args.chosen_learning_rate, args.seed
    for turn in range(args.rounds):
        args.seed = seed + 3 + 2 * turn  # after hardness and gates
        set_seed(args.seed)
        ee.EarlyExitTrainer(model=model, args=args, train_dataset=encoded["train"], processing_class=tokenizer).train()
    model.requires_grad_(True)
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of train_exits.py")
    parser.add_argument("--out", type=Path, default=Path("build/chosen"))
    parser.add_argument("--rows", type=int, default=8000, help="at most so many train rows, drawn by lot")
    parser.add_argument("--control", action="store_true", help="all exits instead of those at which rows leave")
    parser.add_argument("--settings", type=json.loads, default={}, help="of ConsistentTrainingArguments, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for start in args.models:
        out = args.out / start.name
        if not (out / "train.json").exists():
            train(start, out, args.rows, args.control, args.settings)


if __name__ == "__main__":
    main()
