"""Lossless early exit of a language model against its own plain decoding, in calls of layers and in time.

    python benchmarks/lossless.py --model EXITS --plain PLAIN

EXITS is a folder that `benchmarks/lossless_exits.py` wrote, with the gates of `benchmarks/lossless_rules.py`, and
PLAIN the checkpoint it began with. For every rule, thresholds and the number of waiting drafts are those with the
fewest calls of layers on texts of wikitext-2's validation part that the exits were not trained on. Texts are then
written from prompts of its test part, plain and without loss in turns, until the part's minutes are over. The best rule
then writes in fours and in bfloat16, and stock transformers with `assistant_early_exit`. Calls of layers are counted by
hooks, and a run whose own count differs ends with an error. Where a text differs, the gap between both words is measured in
the full model's logits. Times are processor seconds of one thread. `--parts` makes some of these; the report keeps the rest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import quantiles
from typing import NamedTuple

import pandas as pd
import torch
from scipy.stats import chi2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS, calibrate_drafts, measure_costs
from hf_earlyexit.generation.draft_trace import DraftCosts
from hf_earlyexit.generation.full_texts import texts_of_rows
from hf_earlyexit.policies.base import POLICIES

RESULT = Path(__file__).parent / "results" / "lossless.json"
ASKED = "Write a short paragraph that starts with: "
FOURS = 4
RULES = ("confidence", "gate")
CHOSEN = ("rule", "thresholds", "drafts", "expected_layer_calls", "expected_speed_up")


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


def counted(layers: Iterable[torch.nn.Module]) -> list[int]:
    """The number of calls of some layers from now on."""
    calls = [0]
    for layer in layers:
        layer.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def compare(model: object, calls: list[int], prompts: list[list[int]], new: int, drafts: int, turn: int) -> dict[str, float]:
    """One batch written plain and without loss: equal ids, calls of layers behind the prompt, drafts, and times."""
    given = {**batch_of(prompts), "max_new_tokens": new, "do_sample": False, "return_exit_layers": True}
    ways = {"plain": {"early_exit": False}, "lossless": {"lossless": True, "max_drafts": drafts}}
    outputs, seconds, made = {}, {}, {}
    for way in sorted(ways, reverse=bool(turn % 2)):
        calls[0], begin = 0, time.process_time()
        outputs[way] = model.generate(**given, **ways[way])
        seconds[way], made[way] = time.process_time() - begin, calls[0] - len(model.model.layers)
    full, drafted, counts = outputs["plain"].sequences, outputs["lossless"].sequences, outputs["lossless"].draft_counts
    written = (outputs["plain"].exit_layers > 0).sum(1)
    steps = int(written.max()) - 1
    if made["lossless"] != counts.layer_calls or made["plain"] != steps * len(model.model.layers):
        raise RuntimeError(f"Hooks counted {made}; the run {counts.layer_calls}, and {steps} plain steps.")
    equal = [one.tolist() == two.tolist() for one, two in zip(full, drafted, strict=True)]
    width = max(map(len, prompts))
    gaps = [
        gap(lambda place, row=row: model(full[row][None, width - len(prompts[row]) : place]).logits, full[row], drafted[row])
        for row, same in enumerate(equal)
        if not same
    ]
    return {
        "texts": len(prompts), "equal": sum(equal), "tokens": int(written.sum()) - len(prompts), "steps": steps,
        "layer_calls": made["lossless"], "drafted": sum(counts.drafted), "accepted": sum(counts.accepted),
        "plain_seconds": seconds["plain"], "lossless_seconds": seconds["lossless"], "gaps": gaps,
    }  # fmt: skip


def gap(logits_before: Callable[[int], torch.Tensor], full: torch.Tensor, drafted: torch.Tensor) -> float:
    """Where a text first differs: how far its two words are apart in the full model's logits, in roundings of the dtype.

    `logits_before` gives the full model's `[1, N, V]` of the text before a place.
    """
    width = min(len(full), len(drafted))
    place = int((full[:width] != drafted[:width]).int().argmax())
    logits = logits_before(place)[0, -1]
    first, second = logits[full[place]].float(), logits[drafted[place]].float()
    return float((first - second).abs() / (torch.finfo(logits.dtype).eps * first.abs()))


def total_of(rows: list[dict[str, float]], layers: int) -> dict[str, float]:
    """Sums, and the time saved with the middle half of the texts' own ratios."""
    total = {name: sum((row[name] for row in rows), [] if name == "gaps" else 0) for name in rows[0]}
    calls = {"layer_calls_per_step": total["layer_calls"] / total["steps"], "plain_layer_calls_per_step": layers}
    ratios = [row["plain_seconds"] / row["lossless_seconds"] for row in rows]
    spread = quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios * 2
    return total | calls | {"speed_up": total["plain_seconds"] / total["lossless_seconds"], "speed_up_middle_half": spread}


def stock(name: Path, prompts: list[list[int]], new: int, depth: int) -> dict[str, float]:
    """Stock transformers with `assistant_early_exit` against itself without: calls of layers a token, and times."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    calls = counted(model.model.layers)
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


def closed_policy(model: object, rule: str) -> ee.policies.ExitPolicy:
    """A rule without thresholds."""
    layers = model.exit_layers
    return POLICIES.get(rule)(thresholds=(None,) * (len(layers) - 1), exit_layers=layers)


def sampled(rows: int, words: int = 90, new: int = 3) -> dict[str, float]:
    """Texts drawn with and without drafts by a tiny Llama of random weights: two samples of one distribution.

    Each text is one outcome; outcomes seen fewer than ten times stand together. Chi-square of the two rows of counts.
    """
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    plain_config = LlamaConfig(vocab_size=words, initializer_range=0.3, **shape)
    model = ee.EarlyExitLlamaForCausalLM(ee.EarlyExitLlamaLMConfig(**plain_config.to_diff_dict(), exit_layers=[1, 4])).eval()
    for layer in model.model.layers[1:]:  # so that the upper layers change little, and many drafts are right
        for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
            part.weight *= 0.15
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.1,)))
    ids = torch.randint(4, words, (1, 4)).expand(rows, -1)
    options = {"do_sample": True, "top_k": 5, "temperature": 0.9, "max_new_tokens": new, "pad_token_id": 0}
    full = model.generate(ids, early_exit=False, eos_token_id=None, **options)[:, 4:]
    drafted = model.generate(ids, lossless=True, return_exit_layers=True, eos_token_id=None, **options)
    base = words ** torch.arange(new - 1, -1, -1)
    _, kinds = torch.cat([full @ base, drafted.sequences[:, 4:] @ base]).unique(return_inverse=True)
    counts = torch.stack([torch.bincount(part, minlength=int(kinds.max()) + 1) for part in kinds.split(rows)])
    often = counts.sum(0) >= 10
    counts = torch.cat([counts[:, often], counts[:, ~often].sum(1, keepdim=True)], 1).double()
    statistic = float(((counts[0] - counts[1]) ** 2 / counts.sum(0).clamp_min(1)).sum())
    degrees = counts.shape[1] - 1
    return {
        "tokens": rows * new, "drafted": sum(drafted.draft_counts.drafted), "accepted": sum(drafted.draft_counts.accepted),
        "statistic": statistic, "degrees": degrees, "chance": float(chi2.sf(statistic, degrees)),
    }  # fmt: skip


class Part(NamedTuple):
    """Texts that are written plain and without loss: which, how, and for how long."""

    size: int
    texts: int
    minutes: float


def run_part(model: object, calls: list[int], prompts: list[list[int]], part: Part, chosen: dict, new: int) -> dict:
    """What both ways gave for a rule's setting."""
    model.set_exit_policy(closed_policy(model, chosen["rule"]).with_thresholds(tuple(chosen["thresholds"])))
    rows, begin = [], time.process_time()
    for turn, start in enumerate(range(0, part.texts, part.size)):
        if time.process_time() - begin > 60 * part.minutes:
            break
        rows.append(compare(model, calls, prompts[start : start + part.size], new, chosen["drafts"], turn))
    return {**chosen, **total_of(rows, model.exit_layers[-1])}


def choose(model: object, held: list[dict], rule: str, costs: DraftCosts) -> dict:
    """The best setting in which something leaves, on texts that were held back."""
    found = calibrate_drafts(model, held, rule, drafts=(1, 2, 3, 4), costs=costs, confirm=False)
    best = next(one for one in found.settings if one.policy.may_leave)
    return {
        "rule": rule, "thresholds": list(best.policy.thresholds), "drafts": best.drafts,
        "expected_layer_calls": best.expected.layer_calls, "expected_speed_up": best.expected.speed_up,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--plain", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=[*RULES, "time", "fours", "bfloat16", "stock", "sampling"])
    parser.add_argument("--minutes", type=float, default=15, help="for each part, of processor time")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--stock_prompts", type=int, default=10)
    parser.add_argument("--sampled_texts", type=int, default=6700)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = ee.from_pretrained(args.model, task="text-generation").eval()
    calls = counted(model.model.layers)
    held = json.loads((args.model / "samples.json").read_text())["held_back"]
    prompts = chat_prompts(AutoTokenizer.from_pretrained(args.model), "test")[: args.prompts]
    result = json.loads(args.report.read_text()) if args.report.is_file() else {"parts": {}}
    result |= {"layers": model.exit_layers[-1], "exit_layers": list(model.exit_layers), "new_tokens": args.new_tokens,
               "shortlist": model.config.exit_shortlist, "torch": torch.__version__}  # fmt: skip
    for name in args.parts:
        if name == "stock":
            result["stock"] = [stock(args.plain, prompts[: args.stock_prompts], args.new_tokens, depth) for depth in (6, 26)]
        elif name == "sampling":
            result["sampling"] = sampled(args.sampled_texts)
        elif name in RULES:
            chosen = choose(model, held, name, LAYER_CALLS)
            part = Part(1, len(prompts), args.minutes)
            result["parts"][name] = run_part(model, calls, prompts, part, chosen, args.new_tokens)
        elif not result["parts"]:
            parser.error(f"{name} goes on from the best of {', '.join(RULES)}; make those first.")
        else:
            rule = min(RULES, key=lambda one: result["parts"].get(one, {}).get("expected_layer_calls", math.inf))
            chosen = {key: result["parts"][rule][key] for key in CHOSEN}
            if name == "time":
                costs = measure_costs(model, closed_policy(model, rule), texts_of_rows(held))
                result["costs"], chosen = costs._asdict(), choose(model, held, rule, costs)
            model.to(torch.bfloat16 if name == "bfloat16" else torch.float32)
            part = Part(FOURS if name == "fours" else 1, len(prompts), args.minutes)
            result["parts"][name] = run_part(model, calls, prompts, part, chosen, args.new_tokens)
        print(name, result["parts"].get(name, result.get(name)), flush=True)
        args.report.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
