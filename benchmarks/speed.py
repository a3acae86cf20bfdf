"""Measure what early exit brings in time, and write the results and the docs' page.

    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape minilm
    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape bert --forms fp32 int8 onnx-int8 onnx-int8-static
    OMP_NUM_THREADS=1 python benchmarks/speed.py --shape modernbert --forms int8 onnx-int8 onnx-int8-static

Each run adds its part to benchmarks/results/speed.json and makes docs/how-to/speed.md anew. Shapes have random weights and
mixed lengths (log-normal, median 28 tokens); their thresholds are set so that rows leave at half the depth in the mean.
All exits, heads and decisions are really computed. Time is the CPU time of one thread. `speed_trained.py` measures trained
models.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from speed_page import SHAPES, TITLES, add_results

import hf_earlyexit as ee
from hf_earlyexit.measuring.bench import bench
from hf_earlyexit.measuring.forms import MEASURED, make_forms
from hf_earlyexit.modeling.protocol import TorchExitClassifier
from hf_earlyexit.policies import ExitPolicy
from hf_earlyexit.serving.batching import sorted_batches


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
    parser.add_argument("--scheduler", action="store_true", help="cost of 1,000 to 100,000 rows")
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--latency-rows", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    if args.shape:
        found[args.shape] = shape_run(args.shape, args.rows, args.repeats, args.latency_rows, args.forms)
    if args.scheduler:
        found["scheduler"] = scheduler_run()
    add_results(found)


if __name__ == "__main__":
    main()
