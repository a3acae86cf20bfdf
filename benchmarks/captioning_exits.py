"""Teach a trained captioner its exits, and the gates beside them.

    python benchmarks/captioning_exits.py tuned linear joint --out build/captioning

writes OUT/<exits>-<seed>/: the model of OUT/full12-<seed> with exits, its tokenizer and image processor, and exits.json.

- linear: the paper's recipe, a head of its own for each exit; each starts as a copy of the decoder's.
- tuned: a linear map for each exit before the decoder's own head, gates, and a shortlist of frequent words.
- joint: every second layer is an exit, all use the decoder's own head, and the whole decoder learns with them.

The first two leave the decoder as it is.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from captioning_data import load_captions, load_encoder, load_features, load_tokenizer
from captioning_train import PackedBatch, packed_split
from transformers import set_seed

import hf_earlyexit as ee


@dataclass(frozen=True)
class ExitRecipe:
    """Exits, and how they are trained."""

    exit_head: str
    exit_gate: str | None = None
    exit_layers: tuple[int, ...] | None = None
    objective: str = "two-stage"
    shortlist: int | None = None
    photos: int = 2400
    epochs: float = 1.0
    gate_epochs: float = 0.5
    photos_a_step: int = 16  # times five captions
    learning_rate: float = 2e-3
    warmup: float = 0.05


RECIPES = {
    "linear": ExitRecipe(exit_head="linear"),
    "tuned": ExitRecipe(exit_head="tuned", exit_gate="linear", shortlist=500),
    "joint": ExitRecipe(
        exit_head="tied",
        exit_gate="linear",
        exit_layers=(2, 4, 6, 8, 10, 12),
        objective="weighted",
        shortlist=500,
        photos=6000,
        epochs=1.0,
        gate_epochs=0.1,
        learning_rate=3e-4,
    ),
}


def train(name: str, recipe: ExitRecipe, seed: int, out: Path) -> None:
    set_seed(seed)
    tokenizer = load_tokenizer(out)
    model = ee.EarlyExitVisionEncoderDecoder.from_pretrained(
        out / f"full12-{seed}",
        exit_head=recipe.exit_head,
        exit_gate=recipe.exit_gate,
        exit_layers=None if recipe.exit_layers is None else list(recipe.exit_layers),
    )
    model.encoder.requires_grad_(False)
    if recipe.shortlist:
        ids = tokenizer([caption for five in load_captions("train") for caption in five])["input_ids"]
        model.set_exit_shortlist(torch.tensor([word for caption in ids for word in caption[1:]]), recipe.shortlist)
    if recipe.exit_head == "linear":
        for head in model.exit_heads.values():
            head.norm.load_state_dict(model.decoder.transformer.ln_f.state_dict())
            head.vocabulary.load_state_dict(model.decoder.lm_head.state_dict())
    model.decoder.set_attn_implementation("eager")  # trains faster on a CPU
    parts = {split: packed_split(split, tokenizer) for split in ("train", "dev")}
    parts = {"train": parts["train"].shuffle(seed).select(range(recipe.photos)), "dev": parts["dev"].select(range(300))}
    collator = PackedBatch({split: load_features(out, split) for split in parts}, tokenizer.pad_token_id)
    logs, start = {}, time.perf_counter()
    for stage, epochs in (("exits", recipe.epochs), ("gates", recipe.gate_epochs if recipe.exit_gate else 0)):
        if not epochs:
            continue
        args = ee.EarlyExitTrainingArguments(
            output_dir=str(out / "checkpoints" / f"{name}-{seed}-{stage}"),
            objective=recipe.objective,
            objective_options={"strength": 1.0, "direction": "last-to-exit"} if recipe.objective == "two-stage" else None,
            num_train_epochs=epochs,
            per_device_train_batch_size=recipe.photos_a_step,
            per_device_eval_batch_size=recipe.photos_a_step,
            learning_rate=recipe.learning_rate if stage == "exits" else 2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup,
            train_sampling_strategy="group_by_length",
            eval_strategy="epoch",
            save_strategy="no",
            remove_unused_columns=False,
            logging_steps=25,
            disable_tqdm=True,
            report_to=[],
            seed=seed,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = ee.EarlyExitCaptioningTrainer(
            model=model,
            args=args,
            learn_gates=stage == "gates",
            data_collator=collator,
            train_dataset=parts["train"],
            eval_dataset=parts["dev"],
        )
        trainer.train()
        logs[stage] = trainer.state.log_history
    record = {
        "name": name, "seed": seed, **asdict(recipe), "autocast": "bfloat16",
        "minutes": round((time.perf_counter() - start) / 60, 1), "log": logs,
    }  # fmt: skip
    model.decoder.set_attn_implementation("sdpa")
    target = out / f"{name}-{seed}"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    load_encoder(out)[1].save_pretrained(target)
    (target / "exits.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, default=Path("build/captioning"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.names:
        if not (args.out / f"{name}-{args.seed}" / "exits.json").exists():
            train(name, RECIPES[name], args.seed, args.out)


if __name__ == "__main__":
    main()
