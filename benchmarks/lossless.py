"""Lossless early exit of a language model against its own plain decoding, in calls of layers and in time.

    python benchmarks/lossless.py --model EXITS --plain PLAIN

EXITS is a folder that `benchmarks/lossless_exits.py` wrote, with the gates of `benchmarks/lossless_rules.py`, and
PLAIN the checkpoint it began with. For every rule, thresholds and the number of waiting drafts are those with the
fewest calls of layers on texts of wikitext-2's validation part that the exits were not trained on. Texts are then
written from prompts of its test part, plain and without loss in turns, until the rule's minutes are over. A few are
written in fours, in bfloat16, and by stock transformers with `assistant_early_exit`, whose calls of layers are
counted by hooks. Times are processor seconds of one thread.
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS, DraftSetting, calibrate_drafts, measure_costs

RESULT = Path(__file__).parent / "results" / "lossless.json"
ASKED = "Write a short paragraph that starts with: "
FOURS = 4


def plain(text: str) -> str:
    """A line of wikitext-2 as people write it."""
    for mark, sign in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(mark, sign)
    return re.sub(r" ([,.;:!?)'])", r"\1", text)


def chat_prompts(tokenizer: object, part: str) -> list[list[int]]:
    """Token ids of chats that ask for a paragraph, one for each paragraph of a part of wikitext-2, in a fixed order."""
    lines = pd.read_parquet(Path(os.environ["HF_EARLYEXIT_DATA"]) / "wikitext2" / f"{part}.parquet").text
    starts = [" ".join(plain(line).split()[:10]) for line in lines if not line.startswith("=") and len(line.split()) > 30]
    starts = [start for start in starts if "<unk>" not in start and '"' not in start]
    order = torch.randperm(len(starts), generator=torch.Generator().manual_seed(0)).tolist()
    chats = [[{"role": "user", "content": ASKED + starts[place]}] for place in order]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def batch_of(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Prompts padded on the left."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"inputs": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def compare(model: object, prompts: list[list[int]], new: int, drafts: int, turn: int) -> dict[str, float]:
    """One batch written plain and without loss: equal ids, calls of layers, drafts, and times."""
    given = {**batch_of(prompts), "max_new_tokens": new, "do_sample": False, "return_exit_layers": True}
    ways = {"plain": {"early_exit": False}, "lossless": {"lossless": True, "max_drafts": drafts}}
    outputs, seconds = {}, {}
    for way in sorted(ways, reverse=bool(turn % 2)):
        begin = time.process_time()
        outputs[way] = model.generate(**given, **ways[way])
        seconds[way] = time.process_time() - begin
    full, counts = outputs["plain"].sequences, outputs["lossless"].draft_counts
    written = (outputs["plain"].exit_layers > 0).sum(1)
    equal = [bool((one == two).all()) for one, two in zip(full, outputs["lossless"].sequences, strict=True)]
    return {
        "texts": len(prompts), "equal": sum(equal), "tokens": int(written.sum()) - len(prompts),
        "steps": int(written.max()) - 1, "layer_calls": counts.layer_calls, "drafted": sum(counts.drafted),
        "accepted": sum(counts.accepted), "plain_seconds": seconds["plain"], "lossless_seconds": seconds["lossless"],
    }  # fmt: skip


def total_of(rows: list[dict[str, float]], layers: int) -> dict[str, float]:
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    calls = {"layer_calls_per_step": total["layer_calls"] / total["steps"], "plain_layer_calls_per_step": layers}
    return total | calls | {"speed_up": total["plain_seconds"] / total["lossless_seconds"]}


def stock(name: Path, prompts: list[list[int]], new: int, depth: int) -> dict[str, float]:
    """Stock transformers with `assistant_early_exit` against itself without: calls of layers a token, and times."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    calls = [0]
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    result = {"assistant_early_exit": depth, "texts": len(prompts), "equal": 0, "tokens": 0}
    outputs = []
    for way, options in (("plain", {}), ("assisted", {"assistant_early_exit": depth})):
        calls[0], begin, texts = 0, time.process_time(), []
        for prompt in prompts:
            texts.append(model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False, **options)[0].tolist())
        result |= {f"{way}_layer_calls": calls[0], f"{way}_seconds": time.process_time() - begin}
        outputs.append(texts)
    result["equal"] = sum(one == two for one, two in zip(*outputs, strict=True))
    result["tokens"] = sum(len(text) - len(prompt) for text, prompt in zip(outputs[0], prompts, strict=True))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--rules", nargs="+", default=["confidence", "gate"])
    parser.add_argument("--minutes", type=float, default=3, help="for each rule, of processor time")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--fours", type=int, default=2, help="batches of four, also in bfloat16")
    parser.add_argument("--stock_prompts", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = ee.from_pretrained(args.model, task="text-generation").eval()
    tokenizer, layers = AutoTokenizer.from_pretrained(args.model), model.exit_layers[-1]
    held = json.loads((args.model / "samples.json").read_text())["held_back"]
    prompts = chat_prompts(tokenizer, "test")[: args.prompts]
    result = {"layers": layers, "exit_layers": list(model.exit_layers), "new_tokens": args.new_tokens,
              "shortlist": model.config.exit_shortlist, "torch": torch.__version__, "rules": {}}  # fmt: skip
    best: DraftSetting | None = None
    for rule in args.rules:
        found = calibrate_drafts(model, held, rule, drafts=(1, 2, 3, 4), costs=LAYER_CALLS, confirm=False)
        chosen = next(one for one in found.settings if one.policy.may_leave)
        model.set_exit_policy(chosen.policy)
        rows, begin = [], time.process_time()
        for turn, prompt in enumerate(prompts):
            if time.process_time() - begin > 60 * args.minutes:
                break
            rows.append(compare(model, [prompt], args.new_tokens, chosen.drafts, turn))
        result["rules"][rule] = {
            "thresholds": list(chosen.policy.thresholds), "drafts": chosen.drafts,
            "expected_layer_calls": chosen.expected.layer_calls, "costs": measure_costs(model, chosen.policy)._asdict(),
            **total_of(rows, layers),
        }  # fmt: skip
        print(rule, result["rules"][rule], flush=True)
        args.report.write_text(json.dumps(result, indent=1) + "\n")
        if best is None or chosen.expected.layer_calls < best.expected.layer_calls:
            best = chosen
    model.set_exit_policy(best.policy)
    fours = [prompts[start : start + FOURS] for start in range(0, FOURS * args.fours, FOURS)]
    rows = [compare(model, four, args.new_tokens, best.drafts, turn) for turn, four in enumerate(fours)]
    result["fours"] = total_of(rows, layers)
    print("fours", result["fours"], flush=True)
    result["stock"] = [stock(args.plain, prompts[: args.stock_prompts], args.new_tokens, depth) for depth in (6, 26)]
    print("stock", result["stock"], flush=True)
    model.to(torch.bfloat16)
    rows = [compare(model, [prompt], args.new_tokens, best.drafts, turn) for turn, prompt in enumerate(prompts[: 2 * FOURS])]
    result["bfloat16"] = total_of(rows, layers)
    print("bfloat16", result["bfloat16"], flush=True)
    args.report.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
