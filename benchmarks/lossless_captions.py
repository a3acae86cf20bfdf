"""Captions without loss against plain decoding of the same captioner, in calls of layers and in time.

    python benchmarks/lossless_captions.py whole tuned --out build/captioning

`whole` and `tuned` are captioners of `captioning_exits.py`: exits trained with the decoder, and added later. For every rule,
thresholds and the number of waiting drafts are chosen on photos of dev by what a trace and the costs of this machine let
expect, for calls of layers and for time. The fastest then writes captions of all photos of test, plain and without loss in
turns, one at a time and eight at a time; with eight a fixed depth is run as well, with the number of drafts that is fastest
on dev, as rows that draft alike stay together. Times are processor seconds of one thread. A second pass writes all of it
again with hooks on the layers: it counts their calls, ends with an error where a run's own count differs, and tells how
fast lossless decoding is where layers are called as transformers calls them.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from captioning_data import load_captions, load_features, load_tokenizer, run_parser
from captioning_metrics import TOKENISER, score
from lossless import LAYER_CALLS, closed_policy, counted, gap, total_of
from transformers import VisionEncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

import hf_earlyexit as ee
from hf_earlyexit.generation.draft_calibration import DraftSetting, measure_costs, replayed_settings
from hf_earlyexit.generation.draft_trace import DraftCosts, replay_drafts, trace_drafts
from hf_earlyexit.generation.full_texts import written_texts
from hf_earlyexit.timing import compare_speed

RESULT = Path(__file__).parent / "results" / "lossless-captions.json"
RULES = {  # rule: policy, signal
    "confidence": ("confidence", "vocabulary"),
    "confidence, shortlist": ("confidence", "shortlist"),
    "margin": ("margin", "vocabulary"),
    "margin, shortlist": ("margin", "shortlist"),
    "patience, shortlist": ("patience", "shortlist"),
    "gate": ("gate", "vocabulary"),
    "saturation": ("saturation", "vocabulary"),
    "fixed depth": ("static", "vocabulary"),
}
DRAFTS, LEVELS, EIGHT = (1, 2, 3, 4, 6, 8), 12, 8
FEW = 250  # photos of the run with the fewest calls, whose time matters less


def described(setting: DraftSetting) -> dict[str, object]:
    expected = setting.expected
    figures = {name: getattr(expected, name) for name in ("speed_up", "layer_calls", "drafted", "accepted")}
    return {"thresholds": list(setting.policy.thresholds), "drafts": setting.drafts, **figures}


def choose(model: ee.EarlyExitVisionEncoderDecoder, states: list[torch.Tensor]) -> dict[str, object]:
    """What exits know on photos of dev, and for every rule the settings with the least time and the fewest calls."""
    texts = written_texts(model, states, EIGHT, {"do_sample": False})
    layers, end = model.exit_layers, model.generation_config.eos_token_id
    traces, costs, rules = {}, {}, {}
    for rule, (policy, model.config.exit_signal) in RULES.items():
        closed = closed_policy(model, policy)
        traces[rule] = trace_drafts(model, texts, closed, [end])
        costs[rule] = measure_costs(model, closed, texts)
    shared = {name: median(one._asdict()[name] for one in costs.values()) for name in DraftCosts._fields}
    for rule, trace in traces.items():  # rules differ in what they ask and draft from alone
        closed = closed_policy(model, RULES[rule][0])
        own = DraftCosts(**{**shared, "ask": costs[rule].ask, "draft": costs[rule].draft})
        by_time, by_calls = (replayed_settings(trace, closed, DRAFTS, LEVELS, by) for by in (own, LAYER_CALLS))
        fewest = next(one for one in by_calls if one.policy.may_leave)
        expected = replay_drafts(trace, fewest.policy, fewest.drafts, layers, own)
        fewest = DraftSetting(policy=fewest.policy, drafts=fewest.drafts, expected=expected)
        quickest = next(one for one in by_time if one.policy.may_leave)
        rules[rule] = {"time": described(quickest), "calls": described(fewest), "ask": own.ask, "draft": own.draft}
        print(rule, rules[rule], flush=True)
    del shared["ask"], shared["draft"]
    agreement = trace.right.float().mean(0).tolist()
    return {"agreement": agreement, "dev_tokens": len(trace.scores), "costs": shared, "rules": rules}


def set_rule(model: ee.EarlyExitVisionEncoderDecoder, rule: str, thresholds: list[float | None]) -> None:
    policy, model.config.exit_signal = RULES[rule]
    model.set_exit_policy(closed_policy(model, policy).with_thresholds(tuple(thresholds)))


def write_both(
    model: ee.EarlyExitVisionEncoderDecoder, hidden: np.ndarray, drafts: int, turn: int, calls: list[int] | None
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """One batch plain and without loss: what `total_of` adds up, and the ids."""
    encoded = BaseModelOutput(last_hidden_state=torch.from_numpy(hidden.astype(np.float32)))
    ways = {"plain": {"early_exit": False}, "lossless": {"lossless": True, "max_drafts": drafts}}
    outputs, seconds, made = {}, {}, {}
    for way in sorted(ways, reverse=bool(turn % 2)):
        before, begin = calls[0] if calls else 0, time.process_time()
        outputs[way] = model.generate(encoder_outputs=encoded, return_exit_layers=True, **ways[way])
        seconds[way], made[way] = time.process_time() - begin, calls[0] - before if calls else None
    ids, counts = {way: output.sequences for way, output in outputs.items()}, outputs["lossless"].draft_counts
    written = (outputs["plain"].exit_layers > 0).sum(1)
    steps, layers = int(written.max()), model.exit_layers[-1]
    if calls and made != {"plain": steps * layers, "lossless": counts.layer_calls}:
        raise RuntimeError(f"Hooks counted {made}; the run {counts.layer_calls}, and {steps} plain steps.")

    def logits_before(row: int, place: int) -> torch.Tensor:
        image = BaseModelOutput(last_hidden_state=encoded[0][row : row + 1])
        return model(encoder_outputs=image, decoder_input_ids=ids["plain"][row : row + 1, :place]).logits

    equal = [one.tolist() == other.tolist() for one, other in zip(ids["plain"], ids["lossless"], strict=True)]
    pairs = [(row, ids["plain"][row], ids["lossless"][row]) for row, same in enumerate(equal) if not same]
    return {
        "texts": len(hidden), "equal": sum(equal), "tokens": int(written.sum()), "steps": steps,
        "layer_calls": counts.layer_calls, "drafted": sum(counts.drafted), "accepted": sum(counts.accepted),
        "plain_seconds": seconds["plain"], "lossless_seconds": seconds["lossless"],
        "gaps": [gap(partial(logits_before, row), *two) for row, *two in pairs],
    }, ids  # fmt: skip


def write_all(
    model: ee.EarlyExitVisionEncoderDecoder, features: np.ndarray, size: int, drafts: int, calls: list[int] | None = None
) -> tuple[dict[str, object], dict[str, list[list[int]]]]:
    """All photos plain and without loss in turns, after a few that warm up."""
    rows, texts = [], {"plain": [], "lossless": []}
    write_both(model, features[:size], drafts, 0, None)
    for turn, first in enumerate(range(0, len(features), size)):
        row, ids = write_both(model, features[first : first + size], drafts, turn, calls)
        rows.append(row)
        for way, batch in ids.items():
            texts[way] += batch.tolist()
    return total_of(rows, model.exit_layers[-1]), texts


def measure(name: str, seed: int, out: Path, dev: int, test: int, repeats: int) -> dict[str, object]:
    path, tokenizer = out / f"{name}-{seed}", load_tokenizer(out)
    model = ee.EarlyExitVisionEncoderDecoder.from_pretrained(path).eval()
    dev_features, features = load_features(out, "dev")[:dev], load_features(out, "test")[:test]
    result = choose(model, list(torch.from_numpy(dev_features.astype(np.float32))))
    rules = result["rules"]
    quickest = max(rules, key=lambda rule: rules[rule]["time"]["speed_up"])
    fewest = min(rules, key=lambda rule: rules[rule]["calls"]["layer_calls"])
    still = {**rules["fixed depth"]["calls"]}
    set_rule(model, "fixed depth", still["thresholds"])
    tries = {most: write_all(model, dev_features[: 10 * EIGHT], EIGHT, most)[0]["speed_up"] for most in (1, 2, 3, 4)}
    still["drafts"] = max(tries, key=tries.get)
    plan = {
        "batch 1": (quickest, rules[quickest]["time"], 1, len(features)),
        "batch 1, fewest calls": (fewest, rules[fewest]["calls"], 1, FEW),
        "batch 8": (quickest, rules[quickest]["time"], EIGHT, len(features)),
        "batch 8, fixed depth": ("fixed depth", still, EIGHT, len(features)),
    }
    stock = VisionEncoderDecoderModel.from_pretrained(path).eval()
    one = BaseModelOutput(last_hidden_state=torch.from_numpy(features[:1].astype(np.float32)))
    ways = {"stock": partial(stock.generate, encoder_outputs=one),
            "plain": partial(model.generate, encoder_outputs=one, early_exit=False)}  # fmt: skip
    result["stock_over_plain"] = compare_speed(ways, "stock", repeats)["plain"].speed_up
    runs, captions = {}, {}
    for run, (rule, setting, size, photos) in plan.items():
        set_rule(model, rule, setting["thresholds"])
        found, texts = write_all(model, features[:photos], size, setting["drafts"])
        runs[run] = {"rule": rule, "setting": setting, "batch": size, **found}
        captions[run] = {way: tokenizer.batch_decode(ids, skip_special_tokens=True) for way, ids in texts.items()}
        print(run, runs[run], flush=True)
    calls = counted(model.backbone.layers(model.decoder))
    for run, (rule, setting, size, photos) in plan.items():
        set_rule(model, rule, setting["thresholds"])
        found, _ = write_all(model, features[:photos], size, setting["drafts"], calls)
        same = ("equal", "tokens", "layer_calls", "drafted", "accepted")
        if any(found[key] != runs[run][key] for key in same):
            raise RuntimeError(f"{run} with hooks gave {found}, without {runs[run]}.")
        runs[run]["speed_up_layers_called"] = found["speed_up"]
    references = load_captions("test")[:test]
    scores = {way: score(captions["batch 1"][way], references) for way in ("plain", "lossless")}
    return {
        "seed": seed, "exit_layers": list(model.exit_layers), "exit_head": model.config.exit_head,
        "shortlist": model.config.exit_shortlist, "vocabulary": len(tokenizer), "dev_photos": len(dev_features),
        "test_photos": len(features), **result, "fixed_depth_tries": tries, "runs": runs, "scores": scores,
        "tokeniser": TOKENISER, "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    parser = run_parser(__doc__, ("whole", "tuned"))
    parser.add_argument("--dev", type=int, default=200, help="photos that choose settings")
    parser.add_argument("--test", type=int, default=1000, help="photos that captions are written of")
    parser.add_argument("--repeats", type=int, default=21, help="turns in which the stock class is timed")
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    report = json.loads(args.report.read_text()) if args.report.is_file() else {}
    for name in args.names:
        report[name] = measure(name, args.seed, args.out, args.dev, args.test, args.repeats)
        args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
