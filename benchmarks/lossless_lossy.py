"""What early exit loses where it is final: perplexity and agreement of every rule against layers, on wikitext-2's test part.

    python benchmarks/lossless_lossy.py --model EXITS

EXITS is a folder that `benchmarks/lossless_exits.py` wrote, with the gates of `benchmarks/lossless_rules.py`. Paragraphs, or
what stands in them between two unknown words, are read one token after the other, as `generate` decodes them, with the true
token in the place of the chosen one: what has left early stands in for itself in the layers above, as it does in serving.
One threshold for all exits is taken from texts that were held back, so that their tokens take a given number of layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path

import pandas as pd
import torch
from lossless import closed_policy, plain
from torch import Tensor
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_trace import trace_drafts
from hf_earlyexit.generation.full_texts import texts_of_rows

RESULT = Path(__file__).parent / "results" / "lossless-lossy.json"
PROMPT = 16  # tokens that run in full
LAYERS = (25, 20)  # of a token of the held-back texts
DEPTHS = (26, 22, 18)


class Reader(LogitsProcessor):
    """Keeps what a model says of every token, and goes on with the true one.

    Args:
        truth: what follows the prompts `[B, T]`.
    """

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.losses, self.words = truth, [], []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        true = self.truth[:, len(self.losses), None]
        self.losses.append(-scores.float().log_softmax(-1).gather(1, true)[:, 0])
        self.words.append(scores.argmax(-1))
        return torch.full_like(scores, -torch.inf).scatter(1, true, 0.0)


def read(model: object, ids: Tensor, policy: object) -> dict[str, Tensor]:
    """Loss, first word and layer of every token after the first, which the prompt's pass gives in full, `[B, T - 1]`."""
    reader = Reader(ids[:, PROMPT:])
    model.set_exit_policy(policy)
    output = model.generate(
        ids[:, :PROMPT], attention_mask=torch.ones_like(ids[:, :PROMPT]), do_sample=False, eos_token_id=None,
        pad_token_id=0, max_new_tokens=ids.shape[1] - PROMPT, logits_processor=LogitsProcessorList([reader]),
        return_exit_layers=True,
    )  # fmt: skip
    assert torch.equal(output.sequences, ids)
    losses, words = (torch.stack(part, 1)[:, 1:] for part in (reader.losses, reader.words))
    return {"loss": losses.double(), "word": words, "layer": output.exit_layers[:, PROMPT + 1 :].double()}


def shared_threshold(scores: Tensor, policy: object, layers: tuple[int, ...], wanted: float) -> float:
    """The threshold, alike at all exits, at which the tokens of a trace come nearest to a number of layers."""
    levels = scores[scores.isfinite()].quantile(torch.linspace(0, 1, 201)).clamp(policy.lowest_threshold)
    levels = (levels.round() if policy.counts else levels).unique()
    depths = torch.tensor(layers)

    def mean(level: Tensor) -> float:
        leaves = scores >= level
        exits = torch.where(leaves.any(1), leaves.int().argmax(1), len(layers) - 1)
        return float(depths[exits].double().mean())

    return float(min(levels, key=lambda level: abs(mean(level) - wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", default=["confidence", "entropy", "patience", "gate"])
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = ee.from_pretrained(args.model, task="text-generation").eval()
    tokenizer, layers = AutoTokenizer.from_pretrained(args.model), model.exit_layers
    lines = pd.read_parquet(Path(os.environ["HF_EARLYEXIT_DATA"]) / "wikitext2" / "test.parquet").text
    pieces = [piece for line in lines if not line.strip().startswith("=") for piece in line.split("<unk>")]
    texts = [plain(piece).strip() for piece in pieces if len(piece.split()) > 60]
    rows = [row for row in tokenizer(texts, add_special_tokens=False)["input_ids"] if len(row) >= PROMPT + args.tokens]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: args.texts].tolist()
    ids = torch.tensor([rows[place][: PROMPT + args.tokens] for place in order])
    held = json.loads((args.model / "samples.json").read_text())["held_back"][: args.texts]
    full = read(model, ids, None)
    result = {"texts": len(ids), "tokens": full["loss"].numel(), "layers": layers[-1], "rules": [],
              "perplexity": math.exp(float(full["loss"].mean())), "torch": torch.__version__}  # fmt: skip

    def judge(rule: str, policy: object) -> None:
        found = read(model, ids, policy)
        apart = (found["loss"] - full["loss"]).mean(1)  # texts are independent, tokens of one are not
        result["rules"].append({
            "rule": rule, "mean_layers": float(found["layer"].mean()), "perplexity": math.exp(float(found["loss"].mean())),
            "agreement": float((found["word"] == full["word"]).double().mean()),
            "more_loss": float(apart.mean()), "standard_error": float(apart.std() / math.sqrt(len(apart))),
        })  # fmt: skip
        print(result["rules"][-1], flush=True)
        args.report.write_text(json.dumps(result, indent=1) + "\n")

    for rule in args.rules:
        closed = closed_policy(model, rule)
        scores = trace_drafts(model, texts_of_rows(held), closed).scores
        for wanted in LAYERS:
            level = shared_threshold(scores, closed, layers, wanted)
            judge(rule, closed.with_thresholds((level,) * (len(layers) - 1)))
    for depth in DEPTHS:
        judge("fixed depth", ee.policies.StaticPolicy.at(layers.index(depth), len(layers)))


if __name__ == "__main__":
    main()
