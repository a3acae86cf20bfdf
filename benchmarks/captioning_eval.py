"""Choose the best epoch of a trained captioner on dev, and score the plain captioners on dev and test.

    python benchmarks/captioning_eval.py full12 static6 --out build/captioning

writes OUT/<name>-<seed>/ (the epoch with the highest CIDEr of greedy captions on dev: model, tokenizer, image processor
and train.json) and, in it, plain.json: BLEU-1, BLEU-4, ROUGE-L, CIDEr, and METEOR where Java is there, by greedy search
and by 3 beams.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from captioning_data import load_captions, load_encoder, load_features, load_tokenizer, run_parser
from captioning_metrics import TOKENISER, score
from captioning_train import RECIPES
from transformers import PreTrainedTokenizerBase, VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput


@torch.inference_mode()
def generate_captions(
    model: VisionEncoderDecoderModel,
    tokenizer: PreTrainedTokenizerBase,
    features: np.ndarray,
    batch_size: int = 100,
    **options: object,
) -> list[str]:
    """One caption a photo, from the encoder's features; `options` go to `generate`."""
    captions = []
    for first in range(0, len(features), batch_size):
        hidden = torch.from_numpy(features[first : first + batch_size].astype(np.float32))
        ids = model.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), **options)
        captions += tokenizer.decode(ids, skip_special_tokens=True)
    return captions


def pick(name: str, seed: int, out: Path) -> None:
    """Save the epoch whose greedy captions score the highest CIDEr on dev as an ordinary model folder."""
    runs = out / "checkpoints" / f"{name}-{seed}"
    record = json.loads((runs / "train.json").read_text())
    tokenizer, features, references = load_tokenizer(out), load_features(out, "dev"), load_captions("dev")
    losses = [entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry]
    checkpoints = sorted(runs.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    record["dev"] = []
    for path, loss in zip(checkpoints, losses, strict=True):
        model = VisionEncoderDecoderModel.from_pretrained(path).eval()
        scores = score(generate_captions(model, tokenizer, features), references)
        record["dev"].append({"loss": loss, **scores})
        print(name, path.name, record["dev"][-1], flush=True)
    best = max(range(len(checkpoints)), key=lambda epoch: record["dev"][epoch]["CIDEr"])
    record["epoch_chosen"] = best + 1
    target = out / f"{name}-{seed}"
    VisionEncoderDecoderModel.from_pretrained(checkpoints[best]).save_pretrained(target)
    tokenizer.save_pretrained(target)
    load_encoder(out)[1].save_pretrained(target)
    (target / "train.json").write_text(json.dumps(record, indent=1) + "\n")


def plain(name: str, seed: int, out: Path) -> list[dict]:
    """Scores of a model as it is, greedy and by beams, on both splits."""
    target = out / f"{name}-{seed}"
    model, tokenizer = VisionEncoderDecoderModel.from_pretrained(target).eval(), load_tokenizer(out)
    rows = []
    for split in ("dev", "test"):
        features, references = load_features(out, split), load_captions(split)
        for beams in (1, 3):
            start = time.perf_counter()
            captions = generate_captions(model, tokenizer, features, num_beams=beams)
            seconds = time.perf_counter() - start
            rows.append({
                "name": name, "seed": seed, "split": split, "photos": len(captions), "beams": beams,
                "layers": model.config.decoder.n_layer, **score(captions, references, meteor=True),
                "words": float(np.mean([len(caption.split()) for caption in captions])),
                "distinct": len(set(captions)), "decode_seconds": round(seconds, 1), "first": captions[:5],
            })  # fmt: skip
            print({key: value for key, value in rows[-1].items() if key != "first"}, flush=True)
    return rows


def main() -> None:
    args = run_parser(__doc__, RECIPES).parse_args()
    for name in args.names:
        target = args.out / f"{name}-{args.seed}"
        if not target.is_dir():
            pick(name, args.seed, args.out)
        if not (target / "plain.json").exists():
            result = {"tokeniser": TOKENISER, "rows": plain(name, args.seed, args.out)}
            (target / "plain.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
