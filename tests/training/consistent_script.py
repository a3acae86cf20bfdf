"""A tiny run of all phases, taken up where it stopped; the tests kill it."""

import json
import os
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import default_data_collator

import hf_earlyexit as ee

COLLATOR = {"data_collator": default_data_collator}


def make_rows(count, seed=0, first_id=0):
    """Token ids, labelled by the first word, each with an id of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (count, 8), generator=generator)
    return Dataset.from_dict(
        {"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist(), "idx": list(range(first_id, first_id + count))}
    )


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    shape = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = ee.EarlyExitBertConfig(**{**shape, "initializer_range": 0.1, "num_labels": 3, "exit_gate": "mlp", **fields})
    return ee.EarlyExitBertForSequenceClassification(config)


def make_args(folder, **fields):
    usual = {
        "output_dir": str(folder),
        "alpha": 0.1,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "chosen_learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    return ee.ConsistentTrainingArguments(**{**usual, **fields})


def run(folder, **fields):
    """Train to the end, from wherever a run in this folder stopped; weights into the folder, the log beside it."""
    args = make_args(folder, **fields)
    trainer = ee.ConsistentTrainer(make_model(), args, make_rows(48), make_rows(40, seed=1), **COLLATOR)
    log = trainer.train(resume_from_checkpoint=True)
    (Path(folder).parent / "log.json").write_text(json.dumps(log))
    if "RANK" in os.environ:
        weights = {name: value.contiguous() for name, value in trainer.model.state_dict().items()}
        save_file(weights, Path(folder).parent / f"rank-{os.environ['RANK']}.safetensors")
    trainer.save_model()
