"""Measure what early exit brings in time, and write the results and the docs' page.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape minilm
    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape bert
    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape modernbert --rows 200 --forms fp32 bf16 int8 onnx-int8
    OMP_NUM_THREADS=1 python benchmarks/speed.py --model build/glue/sst2-0

Each run adds its part to benchmarks/results/speed.json and makes docs/how-to/speed.md anew. Shapes have random weights and
mixed lengths (log-normal, median 28 tokens); their thresholds are set so that rows leave at half the depth in the mean.
All exits, heads and decisions are really computed. Time is the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import SETTINGS, TARGETS
from speed_page import SHAPES, TITLES, page
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.measuring.bench import bench, environment
from hf_earlyexit.measuring.forms import MEASURED, make_forms
from hf_earlyexit.measuring.ways import EARLY, FIRST, FULL
from hf_earlyexit.modeling.protocol import TorchExitClassifier
from hf_earlyexit.policies import ExitPolicy
from hf_earlyexit.serving.batching import sorted_batches
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.timing import seconds_in_turns

ROOT = Path(__file__).parent
RULES = SETTINGS | {"reward": ("reward", {})}
JUDGED = [target for target in TARGETS if "literal" not in target]  # BEEM's own rule does not aim at the last exit
QUARTERS = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
RESULTS, PAGE = ROOT / "results" / "speed.json", ROOT.parent / "docs" / "how-to" / "speed.md"


def mixed_rows(count: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(28), 0.5, count)).round(), 3, 128).astype(int)
    return [{"input_ids": rng.integers(1000, 30000, length).tolist()} for length in lengths]


def all_exits(model, rows) -> ee.ExitTrace:
    """A trace of rows without labels."""
    logits = torch.empty(len(rows), len(model.exit_layers), model.num_labels)
    with torch.inference_mode():
        for places, batch in sorted_batches(rows, 512):
            logits[places] = model(**batch, early_exit=False).exit_logits
    return ee.ExitTrace(logits=logits, labels=torch.zeros(len(rows), dtype=torch.long), exit_layers=model.exit_layers)


def spread_out(trace: ee.ExitTrace, rule: type[ExitPolicy] = ee.ConfidencePolicy) -> ExitPolicy:
    """Thresholds that spread rows over the exits, one a layer, as a normal around half the depth: 6 of 12, deviation 2.5."""
    policy = rule.from_trace(trace)
    scores = policy.scan(trace).scores.double()
    depth = trace.exit_layers[-1]
    wanted = np.clip(np.random.default_rng(1).normal(depth / 2, 2.5 * depth / 12, 100_000).round(), 1, depth)
    left, thresholds = torch.arange(trace.num_rows), []
    for layer in range(1, depth):
        share = (wanted == layer).sum() / (wanted >= layer).sum()
        thresholds.append(float(scores[left, layer - 1].quantile(1 - share)) if len(left) else 1.0)
        left = left[scores[left, layer - 1] < thresholds[-1]]
    return policy.with_thresholds(tuple(min(max(t, 0.0), policy.highest_threshold) for t in thresholds))


def shaped(name: str) -> TorchExitClassifier:
    """A model of a shape, with random weights."""
    torch.manual_seed(0)
    if name in SHAPES:
        config = ee.EarlyExitBertConfig(num_hidden_layers=12, num_labels=2, exit_head="linear-cls", **SHAPES[name])
        return ee.EarlyExitBertForSequenceClassification(config).eval()
    config = ee.EarlyExitModernBertConfig(num_labels=2, exit_head="linear-cls")  # its own defaults are the base model's
    return ee.EarlyExitModernBertForSequenceClassification(config).eval()


def shape_run(name: str, count: int, repeats: int, latency_rows: int, names: list[str] | None) -> dict:
    model = shaped(name)
    rows = mixed_rows(count)
    model.set_exit_policy(spread_out(all_exits(model, rows)))
    forms = make_forms(model, rows, names)
    for form in forms.models.values():
        served = getattr(form, "served", form)
        served.set_exit_policy(spread_out(all_exits(served, rows)))
    found = bench(forms.models, rows, repeats=repeats, latency_rows=latency_rows, clock=time.thread_time)
    return {**found, "left_out": forms.left_out}


def trained_run(folder: Path, repeats: int, latency_rows: int) -> dict:
    """A trained model, calibrated without loss on held-back rows; the static rival is the first exit as accurate there."""
    task = json.loads((folder / "train.json").read_text())["task"]
    splits, tokenizer = load_rows(TASKS[task]), AutoTokenizer.from_pretrained(folder)
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval()
    held_back = splits["held-back"].select(range(min(1000, len(splits["held-back"]))))
    rows, labels = encode_rows(splits["report"], tokenizer), torch.tensor(splits["report"]["label"])
    small = ee.quantize_int8(model)
    traces = {
        "fp32": ee.ExitTrace.load(folder / "held-back.safetensors"),
        "int8": ee.collect_trace(small, held_back, tokenizer=tokenizer, max_batch_tokens=512, progress=False),
    }
    models, accuracy, rivals = {"fp32": model, "int8": small}, {}, []
    for name, one in models.items():
        one.set_exit_policy(ee.calibrate(traces[name], "confidence", ee.MaxDrop(0.0)))
        quality = traces[name].quality.mean(0)
        rivals.append(model.exit_layers[int((quality >= quality[-1]).int().argmax())])
    for name, one in models.items():
        walker = ModelWalker(one)
        ways = {FULL: (None, None), EARLY: (one.exit_policy, None), FIRST.format(rivals[-1]): (None, rivals[-1])}
        for way, (policy, budget) in ways.items():
            logits = Scheduler(walker, policy, 512, budget).run(rows).logits
            accuracy.setdefault(name, {})[way] = float((logits.argmax(-1) == labels).float().mean())
    found = bench(models, rows, static_layer=rivals[-1], repeats=repeats, latency_rows=latency_rows, clock=time.thread_time)
    return {**found, "accuracy": accuracy}


def fold_by_fold(trace: ee.ExitTrace, rule: str, target: str) -> dict[str, float]:
    """What a rule does on held-back rows that neither taught it nor set its thresholds: five parts, each after the rest."""
    policy, options = RULES[rule]
    wish, per_exit = TARGETS[target]
    parts = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(0)).chunk(5)
    right = layers = 0.0
    for number, part in enumerate(parts):
        rest = torch.cat(parts[:number] + parts[number + 1 :])
        made = ee.calibrate(trace.select(rest), policy, wish, options=options, per_exit=per_exit)
        done = ee.replay(made.policy, trace.select(part))
        right, layers = right + done.quality * len(part), layers + done.mean_layers * len(part)
    return {"accuracy": right / trace.num_rows, "mean_layer": layers / trace.num_rows}


def rivals_run(folder: Path, repeats: int) -> dict:
    """In int8, in the same engine: early exit against the first exit as accurate as the last on held-back rows.

    The rule, too, is chosen there: the one that runs the fewest layers of those as accurate as the last exit, fold by fold.
    Its thresholds then come from all held-back rows, but for those that teach a rule with numbers of its own.
    """
    task = json.loads((folder / "train.json").read_text())["task"]
    splits, tokenizer = load_rows(TASKS[task]), AutoTokenizer.from_pretrained(folder)
    small = ee.quantize_int8(ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval())
    trace = ee.collect_trace(small, splits["held-back"], tokenizer=tokenizer, max_batch_tokens=512, progress=False)
    quality = trace.quality.mean(0)
    rival = small.exit_layers[int((quality >= quality[-1]).int().argmax())]
    tried = {f"{rule}; {target}": fold_by_fold(trace, rule, target) for rule in RULES for target in JUDGED}
    good = [name for name, told in tried.items() if told["accuracy"] >= float(quality[-1])]
    if not good:
        raise SystemExit(f"No rule is as accurate as the last exit on held-back rows of {task}: {tried}")
    name = min(good, key=lambda name: tried[name]["mean_layer"])
    rule, target = name.split("; ", 1)
    wish, per_exit = TARGETS[target]
    made = ee.calibrate(trace, RULES[rule][0], wish, options=RULES[rule][1], per_exit=per_exit)
    rows, labels = encode_rows(splits["report"], tokenizer), torch.tensor(splits["report"]["label"])
    walker, answers = ModelWalker(small), {}
    engines = {FULL: (None, None), EARLY: (made.policy, None), FIRST.format(rival): (None, rival)}

    def run(way: str) -> None:
        answers[way] = Scheduler(walker, engines[way][0], 512, engines[way][1]).run(rows)

    seconds = seconds_in_turns({way: [partial(run, way)] for way in engines}, repeats, clock=time.thread_time)
    right = {way: (answers[way].logits.argmax(-1) == labels).double() for way in engines}
    found = {}
    for way, times in seconds.items():
        layers = torch.tensor(small.exit_layers)[answers[way].exit_index]
        found[way] = {
            "accuracy": float(right[way].mean()),
            "mean_layer": float(layers.double().mean()),
            "speed_up": (seconds[FULL] / times).sum(1).quantile(QUARTERS).tolist(),
            "over_shallower": difference(right[way], right[FIRST.format(rival)]),
        }
    faster = (seconds[FIRST.format(rival)] / seconds[EARLY]).sum(1).quantile(QUARTERS).tolist()
    return {"rows": len(rows), "held_back": trace.num_rows, "turns": repeats, "rule": name, "tried": tried, "ways": found,
            "held_back_last_exit": float(quality[-1]), "held_back_shallower": float(quality[small.exit_layers.index(rival)]),
            "early_exit_over_shallower": faster, "environment": environment()}  # fmt: skip


def difference(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Mean difference of the same rows, and its standard error."""
    apart = first - second
    return [float(apart.mean()), float(apart.std() / len(apart) ** 0.5)]


def growth(model) -> list[dict]:
    """CPU time of 1,000 to 100,000 short rows on a tiny model: what the scheduler itself costs a row."""
    found = []
    for count in (1_000, 10_000, 100_000):
        rows = ({"input_ids": [5 + number % 90] * (3 + number % 5)} for number in range(count))
        start = time.thread_time()
        layers = sum(answer.exit_layer for answer in ee.stream(model, rows))
        found.append({"rows": count, "microseconds_per_row": 1e6 * (time.thread_time() - start) / count,
                      "mean_layer": layers / count})  # fmt: skip
    return found


def scheduler_run() -> dict:
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, num_labels=2
    )
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    model.set_exit_policy(ee.policies.StaticPolicy.at(1, 4))
    return {"growth": growth(model)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=TITLES)
    parser.add_argument("--forms", nargs="+", choices=MEASURED, help="with --shape: some of the forms; all by default")
    parser.add_argument("--model", type=Path, help="folder that train_exits.py left")
    parser.add_argument("--rivals", action="store_true", help="with --model: int8 early exit against a shallower model only")
    parser.add_argument("--scheduler", action="store_true", help="cost of 1,000 to 100,000 rows")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency-rows", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    if args.shape:
        found[args.shape] = shape_run(args.shape, args.rows, args.repeats, args.latency_rows, args.forms)
    if args.model and args.rivals:
        found["rivals"] = {args.model.name: rivals_run(args.model, args.repeats)}
    elif args.model:
        found[args.model.name] = trained_run(args.model, args.repeats, args.latency_rows)
    if args.scheduler:
        found["scheduler"] = scheduler_run()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # now: other runs may have written meanwhile
    found["rivals"] = results.get("rivals", {}) | found.get("rivals", {})
    results |= found
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
