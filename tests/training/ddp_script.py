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
from tests.captions.toy import make_captioner
from tests.training import consistent_script

CLASSIFIERS = {  # name: settings
    "find-unused": {"objective": "weighted", "ddp_find_unused_parameters": True},
    "no-find-unused": {"objective": "weighted"},
    "static-graph": {"objective": "weighted", "ddp_static_graph": True},
    "distillation": {"objective": "distillation"},
    "two-stage": {"objective": "two-stage"},
}
CAPTIONERS = {  # name: settings, and whether the gates learn
    "captions": ({"objective": "weighted"}, False),
    "caption-exits": ({"objective": "two-stage"}, False),
    "caption-gates": ({}, True),
}
CASES = (*CLASSIFIERS, *CAPTIONERS)
BY_REWARD = {  # name: settings of a run of all phases
    "sampled": {"chosen_phase": "joint"},
    "exact": {"chosen_phase": "joint", "estimator": "exact"},
    "parted": {},
}


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (count, 8), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": (ids[:, 0] % 3).tolist()})


def captioned(count, seed):
    """Captions of one length: the mean over two ranks is then the mean over all tokens."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 3, 16, 16, generator=generator).numpy()
    return Dataset.from_dict(
        {"pixel_values": pixels, "labels": torch.randint(5, 50, (count, 6), generator=generator).tolist()}
    )


def classifier_trainer(arguments, case):
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
    return ee.EarlyExitTrainer(
        model=ee.EarlyExitBertForSequenceClassification(config),
        args=ee.EarlyExitTrainingArguments(**(arguments | CLASSIFIERS[case])),
        train_dataset=rows(64, 0),
        eval_dataset=rows(45, 1),
        data_collator=default_data_collator,
    )


def captioner_trainer(arguments, case):
    settings, learn_gates = CAPTIONERS[case]
    model = make_captioner(exit_gate="linear")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    return ee.captions.EarlyExitCaptioningTrainer(
        model=model,
        args=ee.EarlyExitTrainingArguments(**arguments, **settings),
        learn_gates=learn_gates,
        train_dataset=captioned(64, 0),
        eval_dataset=captioned(45, 1),
    )


def train(folder, case):
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    arguments = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "ddp_backend": "gloo" if world > 1 else None,
        "ddp_find_unused_parameters": False,
        "per_device_train_batch_size": 16 // world,  # the same rows a step, however many ranks
        "per_device_eval_batch_size": 4,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = (classifier_trainer if case in CLASSIFIERS else captioner_trainer)(arguments, case)
    model = trainer.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    metrics = {name: value for name, value in trainer.evaluate().items() if name.endswith(("accuracy", "agreement"))}
    weights = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    moved = max((weights[name] - before[name]).abs().max().item() for name in weights)
    save_file(weights, folder / f"{case}-{rank}.safetensors")
    report = {"world": trainer.args.world_size, "steps": trainer.state.global_step, "moved": moved, "metrics": metrics}
    (folder / f"{case}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    for name in CASES:
        train(place, name)
    for name, settings in BY_REWARD.items():
        consistent_script.run(place / name / "run", ddp_backend="gloo", ddp_find_unused_parameters=False, **settings)
