"""Trained models against the shallowest part of themselves that is as accurate, both in 8 bits in ONNX Runtime.

    OMP_NUM_THREADS=1 python benchmarks/speed_trained.py build/base-size/*-joint

For each folder that `base_size.py` left. Rows held back from training choose everything: the rule of the early exits, its
thresholds, and where the shallower model is cut off. Report rows, which chose nothing, are then answered by all ways in
turns. Results go to benchmarks/results/speed.json and docs/how-to/speed.md. Time is the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from base_size import TASKS
from report import SETTINGS, TARGETS
from speed_page import EXPORTS, STATIC, add_results
from tasks import load_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.calibration.result import CalibrationResult
from hf_earlyexit.measuring.bench import bench
from hf_earlyexit.measuring.onnx_forms import OnnxForm
from hf_earlyexit.measuring.ways import EARLY, FIRST, FULL
from hf_earlyexit.problem_types import row_quality
from hf_earlyexit.serving.rows import encode_rows

RULES = SETTINGS | {"reward": ("reward", {})}
JUDGED = [target for target in TARGETS if "literal" not in target]  # BEEM's own rule does not aim at the last exit
SCALE_ROWS, MAX_BATCH_TOKENS = 1024, 384


def calibrated(trace: ee.ExitTrace, rule: str, target: str) -> CalibrationResult:
    policy, options = RULES[rule]
    wish, per_exit = TARGETS[target]
    return ee.calibrate(trace, policy, wish, options=options, per_exit=per_exit)


def fold_by_fold(trace: ee.ExitTrace, rule: str, target: str) -> dict[str, float]:
    """What a rule does on held-back rows that neither taught it nor set its thresholds: five parts, each after the rest."""
    parts = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(0)).chunk(5)
    right = layers = 0.0
    for number, part in enumerate(parts):
        made = calibrated(trace.select(torch.cat(parts[:number] + parts[number + 1 :])), rule, target)
        done = ee.replay(made.policy, trace.select(part))
        right, layers = right + done.quality * len(part), layers + done.mean_layers * len(part)
    return {"accuracy": right / trace.num_rows, "mean_layers": layers / trace.num_rows}


def choose(trace: ee.ExitTrace) -> dict:
    """The rule that runs the fewest layers of those as accurate as the last exit, and the first exit that is."""
    quality = trace.quality.mean(0)
    tried = {(rule, target): fold_by_fold(trace, rule, target) for rule in RULES for target in JUDGED}
    good = [both for both, done in tried.items() if done["accuracy"] >= float(quality[-1])]
    if not good:
        raise SystemExit(f"No rule is as accurate as the last exit on held-back rows: {tried}")
    rule, target = min(good, key=lambda both: tried[both]["mean_layers"])
    shallow = int((quality >= quality[-1]).int().argmax())
    return {
        "rows": trace.num_rows, "tried": len(tried), "as_accurate": len(good), "rule": rule, "target": target,
        **tried[rule, target], "last_exit": float(quality[-1]), "layer": trace.exit_layers[shallow],
        "shallower": float(quality[shallow]),
    }  # fmt: skip


def measured(folder: Path, count: int, repeats: int, latency_rows: int) -> dict:
    """Choices on held-back rows, and accuracy and time on report rows."""
    task = json.loads((folder / "train.json").read_text())["task"]
    splits, tokenizer = load_rows(TASKS[task]), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(1.0,) * (len(model.exit_layers) - 1)))
    scale_rows = encode_rows(splits["train"].shuffle(seed=0).select(range(SCALE_ROWS)), tokenizer)
    forms, chosen, reports = {}, {}, {}
    for name, rows in zip(EXPORTS, (None, scale_rows), strict=True):
        forms[name] = OnnxForm(model, int8=True, threads=1, scale_rows=rows)
        held, reports[name] = (
            ee.collect_trace(
                forms[name].served, splits[split], tokenizer=tokenizer, max_batch_tokens=MAX_BATCH_TOKENS, progress=False
            )
            for split in ("held-back", "report")
        )
        chosen[name] = choose(held)
        made = calibrated(held, chosen[name]["rule"], chosen[name]["target"])
        forms[name].served.set_exit_policy(made.policy)
    layer = chosen[STATIC]["layer"]  # the form that is advised
    found = {
        name: {"held_back": chosen[name], "report": answered(form.served.exit_policy, reports[name], layer)}
        for name, form in forms.items()
    }
    print(task, found, flush=True)
    rows = encode_rows(splits["report"].shuffle(seed=0).select(range(min(count, len(splits["report"])))), tokenizer)
    timed = bench(forms, rows, static_layer=layer, repeats=repeats, latency_rows=latency_rows, clock=time.thread_time)
    return {"report_rows": len(splits["report"]), "layer": layer, "forms": found, "timed": timed}


def answered(policy: ee.policies.ExitPolicy, trace: ee.ExitTrace, layer: int) -> dict:
    """Accuracy of each way on labelled rows, how far it is above the part up to `layer`, and early exit's mean layers."""
    scan, rows = policy.scan(trace), torch.arange(trace.num_rows)
    exits = policy.decide(scan.scores)
    shallow = trace.exit_layers.index(layer)
    right = {
        FULL: trace.quality[:, -1],
        EARLY: row_quality(scan.answers, trace.labels, trace.problem_type)[rows, exits],
        FIRST.format(layer): trace.quality[:, shallow],
    }
    mean_layers = float(torch.tensor(trace.exit_layers)[exits].double().mean())
    return {
        way: {"accuracy": float(quality.double().mean()),
              "over_shallower": difference(quality.double(), trace.quality[:, shallow].double()),
              "mean_layers": {FULL: float(trace.exit_layers[-1]), EARLY: mean_layers}.get(way, float(layer))}
        for way, quality in right.items()
    }  # fmt: skip


def difference(first: torch.Tensor, second: torch.Tensor) -> list[float]:
    """Mean difference of the same rows, and its standard error."""
    apart = first - second
    return [float(apart.mean()), float(apart.std() / len(apart) ** 0.5)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=1500, help="report rows that are timed, at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--latency-rows", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        found = measured(folder, args.rows, args.repeats, args.latency_rows)
        add_results({"trained": {json.loads((folder / "train.json").read_text())["task"]: found}})


if __name__ == "__main__":
    main()
