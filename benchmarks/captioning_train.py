"""Train a GPT-2-style decoder on Flickr8k's captions, over the cached features of a frozen ViT.

    python benchmarks/captioning_train.py full12 static6 --out build/captioning

writes OUT/checkpoints/<name>-<seed>/: an ordinary VisionEncoderDecoderModel for every epoch, and train.json (recipe,
wall time and losses); captioning_eval.py chooses among them. The five captions of a photo lie in one row, kept apart by
their positions, so cross-attention's keys and values are made once a photo.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from captioning_data import MAX_TOKENS, load_captions, load_encoder, load_features, load_tokenizer, run_parser
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
    Trainer,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    set_seed,
)

import hf_earlyexit as ee


@dataclass(frozen=True)
class Recipe:
    """A decoder and how it is trained.

    Attributes:
        layers, width, heads, dropout: of the decoder.
        exits: layers with an exit, all of which learn from the first step on; they share the decoder's own head.
    """

    layers: int
    width: int = 256
    heads: int = 4
    dropout: float = 0.1
    epochs: int = 8
    photos_a_step: int = 16  # times five captions
    learning_rate: float = 8e-4
    weight_decay: float = 0.05
    warmup: float = 0.05
    exits: tuple[int, ...] | None = None


RECIPES = {"full12": Recipe(layers=12), "static6": Recipe(layers=6), "exits12": Recipe(layers=12, exits=(3, 6, 9, 12))}


def make_model(out: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VisionEncoderDecoderModel:
    """A frozen encoder and a decoder with random weights; every special token is set in the three configurations."""
    encoder, _ = load_encoder(out)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    decoder = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_positions=MAX_TOKENS, n_embd=recipe.width, n_layer=recipe.layers,
            n_head=recipe.heads, resid_pdrop=recipe.dropout, embd_pdrop=recipe.dropout, attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh", add_cross_attention=True, is_decoder=True, **special,
        )
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder.config, decoder.config)
    config.update({"decoder_start_token_id": tokenizer.bos_token_id, **special})
    if recipe.exits is None:
        model = VisionEncoderDecoderModel(config, encoder=encoder, decoder=decoder)
    else:
        given = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = ee.EarlyExitVisionEncoderDecoderConfig(**given, exit_head="tied", exit_layers=list(recipe.exits))
        model = ee.EarlyExitVisionEncoderDecoder(config, encoder, decoder)
    model.encoder.requires_grad_(False)
    model.generation_config.update(
        decoder_start_token_id=tokenizer.bos_token_id, max_length=MAX_TOKENS, do_sample=False, num_beams=1, **special
    )
    return model


def pack(captions: list[list[str]], tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    """One row a photo: its captions one after another, positions from 0 in each; an unknown word is no target."""

    def row(photo: int) -> dict:
        ids = tokenizer(captions[photo], truncation=True)["input_ids"]
        labels = [word for caption in ids for word in caption[1:]]
        return {
            "photo": photo,
            "input_ids": [word for caption in ids for word in caption[:-1]],
            "position_ids": [place for caption in ids for place in range(len(caption) - 1)],
            "labels": [-100 if word == tokenizer.unk_token_id else word for word in labels],
        }

    return datasets.Dataset.from_list([row(photo) for photo in range(len(captions))])


class PackedBatch:
    """Rows of `pack` and their photos' features as a batch for the model."""

    def __init__(self, features: dict[str, np.ndarray], pad: int) -> None:
        self.features = features
        self.fill = {"decoder_input_ids": pad, "decoder_position_ids": 0, "labels": -100}

    def __call__(self, rows: list[dict]) -> dict:
        columns = {name: [torch.tensor(row[name.removeprefix("decoder_")]) for row in rows] for name in self.fill}
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=self.fill[name])
            for name, part in columns.items()
        }
        hidden = np.stack([self.features[row["split"]][row["photo"]] for row in rows])
        return {"encoder_outputs": (torch.from_numpy(hidden).float(),), "use_cache": False, **batch}


def packed_split(split: str, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset:
    rows = pack(load_captions(split), tokenizer)
    return rows.add_column("split", [split] * len(rows))


def quiet_arguments(folder: Path, recipe: Any, seed: int, **more: Any) -> ee.EarlyExitTrainingArguments:
    """Settings that every run of the benchmark shares; `recipe` gives rates and sizes."""
    usual = {
        "per_device_train_batch_size": recipe.photos_a_step,
        "per_device_eval_batch_size": recipe.photos_a_step,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": recipe.warmup,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "remove_unused_columns": False,
        "logging_steps": 25,
        "disable_tqdm": True,
        "report_to": [],
        "seed": seed,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    return ee.EarlyExitTrainingArguments(str(folder), **(usual | more))


def train(name: str, recipe: Recipe, seed: int, out: Path, max_steps: int = -1) -> None:
    tokenizer = load_tokenizer(out)
    set_seed(seed)
    model = make_model(out, recipe, tokenizer)
    model.decoder.set_attn_implementation("eager")  # on a CPU sdpa's backward pass takes twice the whole step's time
    parts = {split: packed_split(split, tokenizer) for split in ("train", "dev")}
    args = quiet_arguments(
        out / "checkpoints" / f"{name}-{seed}", recipe, seed,
        objective="weighted",  # of exits, where the decoder has some
        num_train_epochs=recipe.epochs,
        max_steps=max_steps,
        weight_decay=recipe.weight_decay,
        save_strategy="epoch" if max_steps < 0 else "no",
        save_only_model=True,
        prediction_loss_only=recipe.exits is None,
    )  # fmt: skip
    collator = PackedBatch({split: load_features(out, split) for split in parts}, tokenizer.pad_token_id)
    trainer = (Trainer if recipe.exits is None else ee.captions.EarlyExitCaptioningTrainer)(
        model=model, args=args, data_collator=collator, train_dataset=parts["train"], eval_dataset=parts["dev"],
        processing_class=tokenizer,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.train()
    record = {
        "name": name, "seed": seed, **asdict(recipe), "vocabulary": len(tokenizer), "autocast": "bfloat16",
        "decoder_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "minutes": round((time.perf_counter() - start) / 60, 1), "log": trainer.state.log_history,
    }  # fmt: skip
    (Path(args.output_dir) / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = run_parser(__doc__, RECIPES)
    parser.add_argument("--max-steps", type=int, default=-1, help="stop early, to time a step; nothing is kept")
    args = parser.parse_args()
    for name in args.names:
        if not (args.out / "checkpoints" / f"{name}-{args.seed}" / "train.json").exists():
            train(name, RECIPES[name], args.seed, args.out, args.max_steps)


if __name__ == "__main__":
    main()
