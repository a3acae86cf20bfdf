"""A few training steps under several settings, alone or on every rank of torchrun; each rank writes what it ended with.

Usage: ddp_script.py <folder>
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import default_data_collator

import hf_earlyexit as ee

CASES = {  # name: (ddp_find_unused_parameters, objective)
    "find-unused": (True, "weighted"),
    "no-find-unused": (False, "weighted"),
    "distillation": (False, "distillation"),
    "two-stage": (False, "two-stage"),
}


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (count, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def train(folder, case):
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    find_unused, objective = CASES[case]
    config = ee.EarlyExitBertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    args = ee.EarlyExitTrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        ddp_find_unused_parameters=find_unused,
        objective=objective,
        per_device_train_batch_size=16 // world,  # the same rows a step, however many ranks
        per_device_eval_batch_size=4,
        train_sampling_strategy="sequential",
        max_steps=4,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    model = ee.EarlyExitBertForSequenceClassification(config)
    trainer = ee.EarlyExitTrainer(
        model=model, args=args, train_dataset=rows(64, 0), eval_dataset=rows(45, 1), data_collator=default_data_collator
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if name.endswith("accuracy")}
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    moved = max((weights[name] - before[name]).abs().max().item() for name in weights)
    save_file(weights, folder / f"{case}-{rank}.safetensors")
    report = {"world": args.world_size, "steps": trainer.state.global_step, "moved": moved, "metrics": metrics}
    (folder / f"{case}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in CASES:
        train(Path(sys.argv[1]), name)
