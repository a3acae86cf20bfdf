"""Teach a trained captioner its exits, and the gates beside them.

    python benchmarks/captioning_exits.py tuned linear whole --out build/captioning

writes OUT/<exits>-<seed>/: a model of captioning_eval.py with exits, its tokenizer and image processor, and exits.json.

- linear: the paper's recipe, a head of its own for each exit; each starts as a copy of the decoder's.
- tuned: a linear map for each exit before the decoder's own head, gates, and a shortlist of frequent words.
- whole: exits12, whose four exits learned with the decoder from the first step; it gets gates and a shortlist.

None of them changes the decoder.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from captioning_data import load_captions, load_encoder, load_features, load_tokenizer, run_parser
from captioning_train import PackedBatch, packed_split, quiet_arguments
from transformers import set_seed

import hf_earlyexit as ee


@dataclass(frozen=True)
class ExitRecipe:
    """Exits, and how they are trained."""

    exit_head: str
    start: str = "full12"
    exit_gate: str | None = None
    exit_layers: tuple[int, ...] | None = None
    shortlist: int | None = None
    photos: int = 2400
    epochs: float = 1.0  # of the exits
    gate_epochs: float = 0.5
    photos_a_step: int = 16  # times five captions
    learning_rate: float = 2e-3
    warmup: float = 0.05


RECIPES = {
    "linear": ExitRecipe(exit_head="linear"),
    "tuned": ExitRecipe(exit_head="tuned", exit_gate="linear", shortlist=500),
    "whole": ExitRecipe(
        exit_head="tied", start="exits12", exit_gate="linear", exit_layers=(3, 6, 9, 12), shortlist=500, epochs=0.0
    ),
}


def train(name: str, recipe: ExitRecipe, seed: int, out: Path) -> None:
    set_seed(seed)
    tokenizer = load_tokenizer(out)
    model = ee.EarlyExitVisionEncoderDecoder.from_pretrained(
        out / f"{recipe.start}-{seed}",
        exit_head=recipe.exit_head,
        exit_gate=recipe.exit_gate,
        exit_layers=None if recipe.exit_layers is None else list(recipe.exit_layers),
        init_missing_exits=True,
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
        args = quiet_arguments(
            out / "checkpoints" / f"{name}-{seed}-{stage}", recipe, seed,
            objective="two-stage",
            objective_options={"strength": 1.0, "direction": "last-to-exit"},
            num_train_epochs=epochs,
            save_strategy="no",
        )  # fmt: skip
        trainer = ee.captions.EarlyExitCaptioningTrainer(
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
    args = run_parser(__doc__, RECIPES).parse_args()
    for name in args.names:
        if not (args.out / f"{name}-{args.seed}" / "exits.json").exists():
            train(name, RECIPES[name], args.seed, args.out)


if __name__ == "__main__":
    main()
