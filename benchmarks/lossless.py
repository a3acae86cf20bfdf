"""Lossless early exit of a language model against its own plain decoding, one text at a time.

    python benchmarks/lossless.py --model EXITS --minutes 12

EXITS is a folder that `benchmarks/lossless_exits.py` wrote. Thresholds and the number of waiting drafts are chosen by
`calibrate_drafts` on prompts of wikitext-2's validation part that the exits were not trained on, then texts are written
from prompts of its test part, plain and without loss in turns, until the minutes are over. Times are processor seconds of
one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_calibration import calibrate_drafts
from hf_earlyexit.policies.base import ExitPolicy

RESULT = Path(__file__).parent / "results" / "lossless.json"
ASKED = "Write a short paragraph that starts with: "


def plain(text: str) -> str:
    """A line of wikitext-2 as people write it."""
    for mark, sign in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, sign)
    return re.sub(r" ([,.;:!?)'])", r"\1", text)


def chat_prompts(tokenizer: object, part: str, words: int = 10) -> list[list[int]]:
    """Token ids of chats that ask for a paragraph by its first words, for paragraphs of a part of wikitext-2, shuffled."""
    lines = pd.read_parquet(Path(os.environ["HF_EARLYEXIT_DATA"]) / "wikitext2" / f"{part}.parquet").text
    starts = [plain(line).split() for line in lines if not line.startswith("=") and len(line.split()) > 30]
    starts = [" ".join(start[:words]) for start in starts]
    starts = [start for start in starts if "<unk>" not in start and '"' not in start]
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
    chats = [[{"role": "user", "content": ASKED + starts[place]}] for place in order]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def run(model: object, prompt: list[int], new: int, **options: object) -> tuple[object, float]:
    begin = time.process_time()
    output = model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, return_exit_layers=True, **options)
    return output, time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--calibration_prompts", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--policy", default="confidence")
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = ee.from_pretrained(args.model, task="text-generation").eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    held = json.loads((args.model / "held-back.json").read_text())
    found = calibrate_drafts(
        model, held[: args.calibration_prompts], args.policy, max_new_tokens=args.new_tokens, confirm=False
    )
    print(found, found.costs, flush=True)
    best_open = next(one for one in found.settings if one.policy.may_leave)
    chosen: ExitPolicy = best_open.policy
    model.set_exit_policy(chosen)
    rows, begin = [], time.time()
    for place, prompt in enumerate(chat_prompts(tokenizer, "test")[: args.prompts]):
        if time.time() - begin > 60 * args.minutes:
            break
        ways = {"plain": {"early_exit": False}, "lossless": {"lossless": True, "max_drafts": best_open.drafts}}
        outputs = {way: run(model, prompt, args.new_tokens, **ways[way]) for way in sorted(ways, reverse=bool(place % 2))}
        (full, plain_time), (drafted, lossless_time) = outputs["plain"], outputs["lossless"]
        counts, new = drafted.draft_counts, full.sequences.shape[1] - len(prompt)
        rows.append({
            "equal": torch.equal(full.sequences, drafted.sequences), "tokens": new, "layer_calls": counts.layer_calls,
            "plain_layer_calls": (new - 1) * model.exit_layers[-1], "drafted": sum(counts.drafted),
            "accepted": sum(counts.accepted), "plain_time": plain_time, "lossless_time": lossless_time,
        })  # fmt: skip
        print(place, rows[-1], flush=True)
        write(args, model, found, best_open, rows)


def write(args: argparse.Namespace, model: object, found: object, best: object, rows: list[dict]) -> None:
    """The result so far; figures of the page come from it."""
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    expected = best.expected
    result = {
        "prompts": len(rows),
        "ids_equal": total["equal"],
        "new_tokens": args.new_tokens,
        "tokens": total["tokens"],
        "layers": model.exit_layers[-1],
        "exit_layers": list(model.exit_layers),
        "shortlist": model.config.exit_shortlist,
        "policy": best.policy.to_dict(),
        "drafts": best.drafts,
        "plain_is_fastest": not found.policy.may_leave,
        "expected_speed_up": expected.speed_up,
        "expected_layer_calls": expected.layer_calls,
        "expected_acceptance": expected.accepted,
        "costs": found.costs._asdict(),
        "calibration_texts": found.num_texts,
        "calibration_tokens": found.num_tokens,
        "agreement": json.loads((args.model / "agreement.json").read_text()),
        "layer_calls_per_token": total["layer_calls"] / (total["tokens"] - len(rows)),
        "plain_layer_calls_per_token": total["plain_layer_calls"] / (total["tokens"] - len(rows)),
        "drafted": total["drafted"],
        "accepted": total["accepted"],
        "plain_seconds": total["plain_time"],
        "lossless_seconds": total["lossless_time"],
        "speed_up": total["plain_time"] / total["lossless_time"],
        "best_settings": [
            {"thresholds": list(one.policy.thresholds), "drafts": one.drafts, "speed_up": one.expected.speed_up,
             "layer_calls": one.expected.layer_calls, "accepted": one.expected.accepted}
            for one in best_per_exit(found)
        ],
        "torch": torch.__version__,
    }  # fmt: skip
    args.report.write_text(json.dumps(result, indent=1) + "\n")


def best_per_exit(found: object) -> list[object]:
    """The fastest setting of each set of open exits."""
    seen: dict[tuple[bool, ...], object] = {}
    for one in found.settings:
        seen.setdefault(tuple(level is not None for level in one.policy.thresholds), one)
    return list(seen.values())


if __name__ == "__main__":
    main()
