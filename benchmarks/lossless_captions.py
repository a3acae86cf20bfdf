"""Captions without loss against plain decoding of the same captioner, in calls of layers and in time.

    python benchmarks/lossless_captions.py whole tuned --out build/captioning

`whole` and `tuned` are captioners of `captioning_exits.py`: exits trained with the decoder, and added later. For every rule,
thresholds and the number of waiting drafts are chosen on photos of dev by what a trace and the costs of this machine let
expect, for calls of layers and for time. The fastest then writes captions of all photos of test, plain and without loss in
turns, one at a time and eight at a time; with eight a fixed depth is run as well, with the number of drafts that is fastest
on dev, as rows that draft alike stay together. Times are processor seconds of one thread. A second pass writes all of it
without loss again, and some of it plain, with hooks on the layers: it counts their calls, ends with an error where a run's
own count differs, and tells how fast lossless decoding is where layers are called as transformers calls them. `--parts`
makes some of these; the report keeps the rest.
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
from hf_earlyexit.timing import seconds_in_turns

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
FEW, MANY = 40, 160  # photos of runs whose time matters less
COUNTED_PLAIN = 25  # batches that are written plain with hooks on the layers
PLAIN = {"early_exit": False}


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


def write(model: ee.EarlyExitVisionEncoderDecoder, hidden: np.ndarray, way: dict[str, object]) -> tuple[object, float]:
    """What one batch gives in one way, and its seconds."""
    encoded = BaseModelOutput(last_hidden_state=torch.from_numpy(hidden.astype(np.float32)))
    begin = time.process_time()
    output = model.generate(encoder_outputs=encoded, return_exit_layers=True, **way)
    return output, time.process_time() - begin


def write_both(
    model: ee.EarlyExitVisionEncoderDecoder, hidden: np.ndarray, drafts: int, turn: int
) -> tuple[dict[str, object], dict[str, torch.Tensor]]:
    """One batch plain and without loss: what `total_of` adds up, and the ids."""
    ways = {"plain": PLAIN, "lossless": {"lossless": True, "max_drafts": drafts}}
    outputs, seconds = {}, {}
    for way in sorted(ways, reverse=bool(turn % 2)):
        outputs[way], seconds[way] = write(model, hidden, ways[way])
    ids, counts = {way: output.sequences for way, output in outputs.items()}, outputs["lossless"].draft_counts
    written = (outputs["plain"].exit_layers > 0).sum(1)

    def logits_before(row: int, place: int) -> torch.Tensor:
        image = BaseModelOutput(last_hidden_state=torch.from_numpy(hidden[row : row + 1].astype(np.float32)))
        return model(encoder_outputs=image, decoder_input_ids=ids["plain"][row : row + 1, :place]).logits

    equal = [one.tolist() == other.tolist() for one, other in zip(ids["plain"], ids["lossless"], strict=True)]
    pairs = [(row, ids["plain"][row], ids["lossless"][row]) for row, same in enumerate(equal) if not same]
    return {
        "texts": len(hidden), "equal": sum(equal), "tokens": int(written.sum()), "steps": int(written.max()),
        "layer_calls": counts.layer_calls, "drafted": sum(counts.drafted), "accepted": sum(counts.accepted),
        "plain_seconds": seconds["plain"], "lossless_seconds": seconds["lossless"],
        "gaps": [gap(partial(logits_before, row), *two) for row, *two in pairs],
    }, ids  # fmt: skip


def write_all(
    model: ee.EarlyExitVisionEncoderDecoder, features: np.ndarray, size: int, drafts: int
) -> tuple[dict[str, object], dict[str, list[list[int]]]]:
    """All photos plain and without loss in turns, after a few that warm up."""
    rows, texts = [], {"plain": [], "lossless": []}
    write_both(model, features[:size], drafts, 0)
    for turn, first in enumerate(range(0, len(features), size)):
        row, ids = write_both(model, features[first : first + size], drafts, turn)
        rows.append(row)
        for way, batch in ids.items():
            texts[way] += batch.tolist()
    return total_of(rows, model.exit_layers[-1]), texts


def count(
    model: ee.EarlyExitVisionEncoderDecoder,
    features: np.ndarray,
    size: int,
    drafts: int,
    calls: list[int],
) -> dict[str, object]:
    """Calls of layers by hooks without loss, for all photos; some are written plain as well, in turns.

    Raises:
        RuntimeError: where a run's own count differs.
    """
    made, counted_plain, seconds = 0, 0, {"plain": 0.0, "lossless": 0.0}
    ways = {"lossless": {"lossless": True, "max_drafts": drafts}, "plain": PLAIN}
    for turn, first in enumerate(range(0, len(features), size)):
        both = turn < COUNTED_PLAIN
        for way in sorted(ways, reverse=bool(turn % 2)) if both else ["lossless"]:
            before = calls[0]
            output, taken = write(model, features[first : first + size], ways[way])
            written = int((output.exit_layers > 0).sum(1).max())
            own = output.draft_counts.layer_calls if way == "lossless" else written * model.exit_layers[-1]
            if calls[0] - before != own:
                raise RuntimeError(f"{way}, photo {first}: hooks counted {calls[0] - before}, the run {own}.")
            made, counted_plain = made + own * (way == "lossless"), counted_plain + size * (way == "plain")
            seconds[way] += taken * both
    return {"hooked_layer_calls": made, "hooked_photos": counted_plain,
            "speed_up_layers_called": seconds["plain"] / seconds["lossless"]}  # fmt: skip


def load(out: Path, name: str, seed: int) -> ee.EarlyExitVisionEncoderDecoder:
    """Anew for each part: a model that was traced keeps transformers' hooks for hidden states, and is slower with them."""
    return ee.EarlyExitVisionEncoderDecoder.from_pretrained(out / f"{name}-{seed}").eval()


def planned(result: dict) -> dict[str, tuple[str, dict, int, int]]:
    """The rule, setting, batch size and number of photos of every run."""
    rules, photos = result["rules"], result["test_photos"]
    quickest = max(rules, key=lambda rule: rules[rule]["time"]["speed_up"])
    fewest = min(rules, key=lambda rule: rules[rule]["calls"]["layer_calls"])
    tries = result["fixed_depth_tries"]
    still = {**rules["fixed depth"]["calls"], "drafts": int(max(tries, key=tries.get))}
    return {
        "batch 1": (quickest, rules[quickest]["time"], 1, photos),
        "batch 1, fewest calls": (fewest, rules[fewest]["calls"], 1, FEW),
        "batch 8": (quickest, rules[quickest]["time"], EIGHT, MANY),
        "batch 8, fixed depth": ("fixed depth", still, EIGHT, photos),
    }


def chosen(model: ee.EarlyExitVisionEncoderDecoder, features: np.ndarray) -> dict[str, object]:
    """Settings of all rules, and of a fixed depth how fast eight photos at a time are with some numbers of drafts."""
    found = choose(model, list(torch.from_numpy(features.astype(np.float32))))
    set_rule(model, "fixed depth", found["rules"]["fixed depth"]["calls"]["thresholds"])
    tries = {str(most): write_all(model, features[: 5 * EIGHT], EIGHT, most)[0]["speed_up"] for most in (1, 2, 3, 4)}
    return {**found, "fixed_depth_tries": tries}


def timed(model: ee.EarlyExitVisionEncoderDecoder, result: dict, features: np.ndarray, out: Path) -> dict[str, object]:
    """Every run plain and without loss in turns, and what its captions are worth."""
    tokenizer, runs, scores = load_tokenizer(out), {}, {}
    for run, (rule, setting, size, photos) in planned(result).items():
        set_rule(model, rule, setting["thresholds"])
        found, texts = write_all(model, features[:photos], size, setting["drafts"])
        runs[run] = {**result.get("runs", {}).get(run, {}), "rule": rule, "setting": setting, "batch": size, **found}
        print(run, runs[run], flush=True)
        if run == "batch 1":
            references = load_captions("test")[:photos]
            for way, ids in texts.items():
                scores[way] = score(tokenizer.batch_decode(ids, skip_special_tokens=True), references)
    return {"runs": runs, "scores": scores}


def over_stock(model: ee.EarlyExitVisionEncoderDecoder, path: Path, features: np.ndarray) -> float:
    """The stock class's time over that of plain decoding with exits that are not asked, for some photos one at a time."""
    stock = VisionEncoderDecoderModel.from_pretrained(path).eval()
    photos = [BaseModelOutput(last_hidden_state=torch.from_numpy(one[None].astype(np.float32))) for one in features[:FEW]]
    ways = {"stock": [partial(stock.generate, encoder_outputs=one) for one in photos],
            "plain": [partial(model.generate, encoder_outputs=one, **PLAIN) for one in photos]}  # fmt: skip
    seconds = seconds_in_turns(ways, 1, clock=time.process_time)
    return float(seconds["stock"].sum() / seconds["plain"].sum())


def main() -> None:
    parser = run_parser(__doc__, ("whole", "tuned"))
    parser.add_argument("--dev", type=int, default=150, help="photos that choose settings")
    parser.add_argument("--test", type=int, default=1000, help="photos that captions are written of")
    parser.add_argument("--parts", nargs="+", default=["choose", "time", "count"], help="the report keeps the rest")
    parser.add_argument("--report", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    dev, features = load_features(args.out, "dev")[: args.dev], load_features(args.out, "test")[: args.test]
    report = json.loads(args.report.read_text()) if args.report.is_file() else {}
    for name in args.names:
        result = report.setdefault(name, {})
        for part in args.parts:
            model = load(args.out, name, args.seed)
            if part == "choose":
                result |= {
                    "seed": args.seed, "exit_layers": list(model.exit_layers), "exit_head": model.config.exit_head,
                    "shortlist": model.config.exit_shortlist, "vocabulary": model.config.decoder.vocab_size,
                    "dev_photos": len(dev), "test_photos": len(features), "tokeniser": TOKENISER,
                    "torch": torch.__version__, **chosen(model, dev),
                }  # fmt: skip
            elif part == "time":
                result["stock_over_plain"] = over_stock(model, args.out / f"{name}-{args.seed}", features)
                result |= timed(model, result, features, args.out)
            else:
                calls = counted(model.backbone.layers(model.decoder))
                for run, (rule, setting, size, photos) in planned(result).items():
                    set_rule(model, rule, setting["thresholds"])
                    result["runs"][run] |= count(model, features[:photos], size, setting["drafts"], calls)
            made = result.get("runs", {}).values()
            if any(run.get("hooked_layer_calls", run["layer_calls"]) != run["layer_calls"] for run in made):
                raise RuntimeError(f"Hooks counted otherwise than the runs: {result['runs']}")
            args.report.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
