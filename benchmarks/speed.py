"""Measure what early exit brings in time, and write the results and the docs' page.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape minilm
    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape bert
    OMP_NUM_THREADS=1 python benchmarks/speed.py --model build/glue/sst2-0

Each run adds its part to benchmarks/results/speed.json and makes docs/how-to/speed.md anew. Shapes have random weights and
mixed lengths (log-normal, median 28 tokens); their thresholds are set so that rows leave after 6 of 12 layers in the mean.
All exits, heads and decisions are really computed. Time is the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.inference.batching import sorted_batches
from hf_earlyexit.inference.bench import EARLY, FULL, STATIC, as_table, bench
from hf_earlyexit.inference.rows import encode_rows
from hf_earlyexit.inference.scheduler import Scheduler
from hf_earlyexit.inference.walker import ModelWalker

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "speed.json", ROOT.parent / "docs" / "how-to" / "speed.md"
SHAPES = {
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12},
    "bert": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
TITLES = {"minilm": "MiniLM shape (12 x 384), exits at 6 of 12", "bert": "BERT-base shape (12 x 768), exits at 6 of 12"}


def mixed_rows(count: int) -> list[dict[str, list[int]]]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(28), 0.5, count)).round(), 3, 128).astype(int)
    return [{"input_ids": rng.integers(1000, 30000, length).tolist()} for length in lengths]


def all_exits(model, rows) -> ee.ExitTrace:
    """A trace of rows without labels."""
    logits = torch.empty(len(rows), 12, model.num_labels)
    with torch.inference_mode():
        for places, batch in sorted_batches(rows, 512):
            logits[places] = model(**batch, early_exit=False).exit_logits
    return ee.ExitTrace(logits=logits, labels=torch.zeros(len(rows), dtype=torch.long), exit_layers=model.exit_layers)


def spread_out(trace: ee.ExitTrace) -> ee.ConfidencePolicy:
    """Thresholds that spread rows over the exits as a normal of mean 6 and deviation 2.5."""
    policy = ee.ConfidencePolicy.from_trace(trace)
    scores = policy.scan(trace).scores.double()
    wanted = np.clip(np.random.default_rng(1).normal(6, 2.5, 100_000).round(), 1, 12)
    left, thresholds = torch.arange(trace.num_rows), []
    for layer in range(1, 12):
        share = (wanted == layer).sum() / (wanted >= layer).sum()
        thresholds.append(float(scores[left, layer - 1].quantile(1 - share)))
        left = left[scores[left, layer - 1] < thresholds[-1]]
    return policy.with_thresholds(tuple(min(max(t, 0.0), 1.0) for t in thresholds))


def shape_run(name: str, count: int, repeats: int, latency_rows: int) -> dict:
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(num_hidden_layers=12, num_labels=2, exit_head="linear-cls", **SHAPES[name])
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    rows = mixed_rows(count)
    models = {"fp32": model, "int8": ee.quantize_int8(model)}
    for one in models.values():
        one.set_exit_policy(spread_out(all_exits(one, rows)))
    return bench(models, rows, repeats=repeats, latency_rows=latency_rows, clock=time.thread_time)


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
        ways = {FULL: (None, None), EARLY: (one.exit_policy, None), STATIC.format(rivals[-1]): (None, rivals[-1])}
        for way, (policy, budget) in ways.items():
            logits = Scheduler(walker, policy, 512, budget).run(rows).logits
            accuracy.setdefault(name, {})[way] = float((logits.argmax(-1) == labels).float().mean())
    found = bench(models, rows, static_layer=rivals[-1], repeats=repeats, latency_rows=latency_rows, clock=time.thread_time)
    return {**found, "accuracy": accuracy}


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
    model.set_exit_policy(ee.StaticPolicy.at(1, 4))
    return {"growth": growth(model)}


HEADER = """# Speed

Generated by `python benchmarks/speed.py` from `benchmarks/results/speed.json`; no figure is typed by hand.

Layers saved are not time saved. Padding, half-empty batches and Python can eat what exits save, and a smaller model is
always an alternative. So measure, with your model and your rows:

```bash
hf-earlyexit bench --model bert-with-exits --input texts.txt --int8 true --output speed.json
```

## Eight bits

On a CPU, 8-bit layers multiply with early exit. Thresholds are chosen anew on the copy's own trace:

```python
import toy

import hf_earlyexit as ee

tokenizer, model, rows = toy.make_tokenizer(), toy.trained_model(), toy.make_rows(500, seed=1)
small = ee.quantize_int8(model)
trace = ee.collect_trace(small, rows, tokenizer=tokenizer, progress=False)
small.set_exit_policy(ee.calibrate(trace, "confidence", ee.MaxDrop(0.01)))
answers = ee.predict(small, rows, tokenizer=tokenizer)
```

A copy cannot be saved: make it again after loading. Its inputs are rounded by the largest value of a batch, so a row's
logits depend a little on its company, and a row near a threshold may leave at another exit from batch to batch.

## What was measured

Ratios are taken turn by turn in one process, in random order; the median, and the middle half in brackets. Time is the CPU
time of one thread. *full, arrival order* is the model as most people run it, batches of 32 padded to the longest; *full*
runs the same rows through our own batches, sorted by length. *early exit, arrival order* is `model(**batch)`, *early exit*
is `predict`. All speed-ups are over the first row of a table. The *token-layer bound* is the speed-up if time were tokens
times layers; the share of it is that of *early exit* over *full*, and at batch 1 over the model row by row, unpadded.

Rows stand end to end inside, so neither *full* nor *early exit* computes padding; what keeps early exit from its bound is
the embedding of every row, the tests at the exits, and Python. The fewer rows, the more the last half-empty chunks weigh.
"""


def page(results: dict) -> str:
    lines = [HEADER]
    for part, found in results.items():
        if part in ("scheduler", "costs"):
            continue
        lines += [f"### {TITLES.get(part, part)}", ""]
        rows, environment = found["rows"], found["environment"]
        lines += [f"{rows['count']} rows of {rows['mean_tokens']:.1f} tokens in the mean.", "", as_table(found), ""]
        columns = ["model", "mean exit layer", "layer speed-up", "token-layer bound", "share reached", "arrival order",
                   "at batch 1"]  # fmt: skip
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, e in found["exits"].items():
            lines.append(f"| {name} | {e['mean_layer']:.2f} | {e['layer_speed_up']:.2f}x | {e['token_layer_bound']:.2f}x "
                         f"| {e['share_of_bound']:.2f} | {e['share_of_bound_in_arrival_order']:.2f} "
                         f"| {e['share_of_bound_at_batch_1']:.2f} |")  # fmt: skip
        lines.append("")
        for name, ways in found.get("accuracy", {}).items():
            lines.append(f"Accuracy, {name}: " + ", ".join(f"{way} {100 * a:.2f} %" for way, a in ways.items()) + ".  ")
        lines += ["", *(f"- {name}: {said}" for name, said in found["advice"].items()), "", *goals(part, found), ""]
        versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
        lines += [f"{environment['machine']}, {environment['cpu']}, {environment['threads']} thread; {versions}.", ""]
    if "scheduler" in results:
        lines += [
            "### Many rows",
            "",
            "Cost grows with the number of rows and no faster: a tiny model (4 x 32), streamed.",
            "",
        ]
        lines += ["| rows | microseconds a row |", "|---|---|"]
        lines += [f"| {g['rows']:,} | {g['microseconds_per_row']:.0f} |" for g in results["scheduler"]["growth"]]
        lines.append("")
    for shape, found in results.get("costs", {}).items():
        lines += [f"### What exits cost, {TITLES[shape].partition(',')[0]}", "", *costs(found), ""]
    return "\n".join(lines).rstrip() + "\n"


def goals(part: str, found: dict) -> list[str]:
    """What was aimed at beside what was reached."""
    ways, exits = found["throughput"], found["exits"]
    if part in SHAPES:
        reached = [
            ("fp32 early exit over the stock model in arrival order", ways["fp32"][EARLY]["speed_up"], 5.5),
            ("int8 early exit over the stock fp32 model in arrival order", ways["int8"][EARLY]["speed_up"], 10),
            ("fp32: share of the token-layer bound", exits["fp32"]["share_of_bound"], 0.97),
            ("fp32: the same in arrival order, batches of 32", exits["fp32"]["share_of_bound_in_arrival_order"], 0.90),
            ("fp32: the same row by row, over the stock model", exits["fp32"]["share_of_bound_at_batch_1"], 0.95),
            ("int8: share of the token-layer bound", exits["int8"]["share_of_bound"], 0.92),
        ]
    else:
        small = ways["int8"]
        static = next(way for way in small if way.startswith("first "))
        over = small[static]["seconds"] / small[EARLY]["seconds"]
        reached = [(f"int8 early exit over an int8 model of the {static}, as accurate on held-back rows", over, 1.0)]
    lines = ["| figure | reached | goal |", "|---|---|---|"]
    return lines + [f"| {name} | {value:.2f} | >= {goal:g} |" for name, value, goal in reached]


def costs(found: dict) -> list[str]:
    """The lines of `speed_costs.py`."""

    def middle(name: str, ratio: list[float], goal: str) -> str:
        return f"| {name} | {ratio[1]:.4g} ({ratio[0]:.4g}-{ratio[2]:.4g}) | {goal} |"

    goals = {"linear-cls, batch 1": "0.005", "linear-cls, batch 32": "0.001", "pooler, batch 1": "0.035",
             "pooler, batch 32": "0.006", "batched": "1.02", "batch 1, over the stock model": "1.04",
             "peak memory": "1.05"}  # fmt: skip
    lines = ["| ratio | median (middle half) | goal |", "|---|---|---|"]
    for name, test in found["exit test over a stock layer"].items():
        lines.append(middle(f"exit test over a stock layer: {name}, 32 tokens", test["ratio"], f"<= {goals[name]}"))
    for name, cost in found["nobody leaves"].items():
        lines.append(middle(f"all exits asked, nobody leaves: {name}", cost["ratio"], f"<= {goals[name]}"))
    lines.append(middle("training step over a plain one", found["training step"]["ratio"], "<= 1.03"))
    loop = found["papers' loop"]
    for name, goal in (("torch", ">= 5"), ("int8", ">= 10")):
        lines.append(middle(f"{name} engine over the papers' loop (one by one, padded to 128)", loop[name], goal))
    sweep, calls = found["2,000 thresholds"], found["microseconds of a layer call"]
    lines.append(f"| 2,000 thresholds, 12 exits, 10,000 rows: ms | {sweep['milliseconds']:.1f} | <= 10 |")
    aims = {"early exit": "<= 100"}
    for name, us in calls.items():
        lines.append(f"| microseconds of a call with nothing to compute: {name} | {us:.0f} | {aims.get(name, '-')} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--model", type=Path, help="folder that train_exits.py left")
    parser.add_argument("--scheduler", action="store_true", help="cost of 1,000 to 100,000 rows")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency-rows", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if args.shape:
        results[args.shape] = shape_run(args.shape, args.rows, args.repeats, args.latency_rows)
    if args.model:
        results[args.model.name] = trained_run(args.model, args.repeats, args.latency_rows)
    if args.scheduler:
        results["scheduler"] = scheduler_run()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
