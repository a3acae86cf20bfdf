"""Flickr8k for the captioning benchmark: photos, captions, a vocabulary learnt from them, a frozen encoder's features.

    python benchmarks/captioning_data.py --out build/captioning

writes to OUT/parts/: `encoder/` (an ordinary ViT for 126 x 126 photos, with its image processor), `tokenizer/` and, per
split, `<split>.npy` (what the encoder makes of each photo, [photos, tokens, width], float16). What is there is left.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, ViTConfig, ViTImageProcessorPil, ViTModel

DATA = Path(os.environ.get("HF_EARLYEXIT_DATA", "../shared/data"))
FOLDER = "flickr8k"
ENCODER = "weights/vit-small-patch14-dinov2-saliency"
ENCODER_LAYERS = 10  # of 12: the last two see less than layers 8 to 10 do
IMAGE_SIZE = 126  # 9 x 9 patches of 14 and the CLS token: 82 tokens
LEAST_COUNT = 5  # of a word, to be in the vocabulary
MAX_TOKENS = 40  # the longest training caption has 37 words
SPLITS = {"train": "train-*.parquet", "dev": "dev.parquet", "test": "test.parquet"}


def run_parser(doc: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """The command line of what trains and scores models by name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(names))
    parser.add_argument("--out", type=Path, default=Path("build/captioning"))
    parser.add_argument("--seed", type=int, default=0)
    return parser


def load_split(split: str) -> datasets.Dataset:
    """The photos of a split with `image` (JPEG bytes), `image_id` and `captions` (five each)."""
    files = sorted(str(path) for path in (DATA / FOLDER).glob(SPLITS[split]))
    if not files:
        raise SystemExit(f"No data at {DATA / FOLDER}; set HF_EARLYEXIT_DATA to the folder that holds {FOLDER}/.")
    return datasets.Dataset.from_parquet(files)


def load_captions(split: str) -> list[list[str]]:
    return [list(captions) for captions in load_split(split).select_columns(["captions"])["captions"]]


def make_tokenizer(captions: Iterable[str], least_count: int = LEAST_COUNT) -> PreTrainedTokenizerFast:
    """A tokenizer of whole lower-case words: those met at least `least_count` times, and four special tokens."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^a-z0-9']+"), " ")])
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(min_frequency=least_count, show_progress=False, special_tokens=special)
    words.train_from_iterator(captions, trainer)
    ends = [(token, words.token_to_id(token)) for token in ("<bos>", "<eos>")]
    words.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    pad, bos, eos, unk = special
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk,
        model_max_length=MAX_TOKENS, padding_side="right", clean_up_tokenization_spaces=False,
    )  # fmt: skip


def make_encoder(path: Path, layers: int = ENCODER_LAYERS, size: int = IMAGE_SIZE) -> ViTModel:
    """The first layers of a ViT, its grid of positions resized once: an ordinary model for `size` x `size` photos."""
    whole = ViTModel.from_pretrained(path, dtype=torch.float32, add_pooling_layer=False)
    config = ViTConfig.from_pretrained(path, num_hidden_layers=layers, image_size=size, dtype="float32")
    encoder = ViTModel(config)  # its pooler is not used; a vision encoder-decoder has one all the same
    weights = whole.state_dict()
    grid = size // config.patch_size
    tokens = torch.empty(1, grid * grid + 1, config.hidden_size)  # only its shape is read
    weights["embeddings.position_embeddings"] = whole.embeddings.interpolate_pos_encoding(tokens, size, size)
    encoder.load_state_dict({name: weights.get(name, new) for name, new in encoder.state_dict().items()})
    return encoder.eval().requires_grad_(False)


def features(encoder: ViTModel, processor: ViTImageProcessorPil, split: str, batch_size: int = 50) -> np.ndarray:
    """What the encoder makes of each photo of a split, [photos, tokens, width], float16."""
    parts = []
    for batch in load_split(split).select_columns(["image"]).iter(batch_size):
        photos = [Image.open(io.BytesIO(image["bytes"])).convert("RGB") for image in batch["image"]]
        with torch.inference_mode():
            hidden = encoder(**processor(photos, return_tensors="pt")).last_hidden_state
        parts.append(hidden.half().numpy())
    return np.concatenate(parts)


def prepare(out: Path) -> None:
    """Make the parts that are missing from OUT/parts."""
    parts = out / "parts"
    if not (parts / "tokenizer").is_dir():
        tokenizer = make_tokenizer(caption for five in load_captions("train") for caption in five)
        tokenizer.save_pretrained(parts / "tokenizer")
    if not (parts / "encoder").is_dir():
        make_encoder(DATA / ENCODER).save_pretrained(parts / "encoder")
        size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ViTImageProcessorPil.from_pretrained(DATA / ENCODER, size=size).save_pretrained(parts / "encoder")
    encoder, processor = load_encoder(out)
    for split in SPLITS:
        if not (parts / f"{split}.npy").exists():
            start = time.perf_counter()
            np.save(parts / f"{split}.npy", features(encoder, processor, split))
            print(f"{split}: encoded in {time.perf_counter() - start:.0f} s", flush=True)


def load_encoder(out: Path) -> tuple[ViTModel, ViTImageProcessorPil]:
    path = out / "parts" / "encoder"
    return ViTModel.from_pretrained(path), ViTImageProcessorPil.from_pretrained(path)


def load_tokenizer(out: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(out / "parts" / "tokenizer")


def load_features(out: Path, split: str) -> np.ndarray:
    """A split's features, read from the file as they are asked for."""
    return np.load(out / "parts" / f"{split}.npy", mmap_mode="r")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/captioning"))
    prepare(parser.parse_args().out)
