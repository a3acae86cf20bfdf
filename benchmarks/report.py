"""Compare every policy on the very same trained models, and write the results and the docs' page.

    python benchmarks/report.py build/glue

reads the traces that train_exits.py left, writes benchmarks/results/glue.json and docs/results.md. Thresholds and the
policies' own numbers come from held-back rows; all figures are on report rows.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tasks import TASKS

import hf_earlyexit as ee
from hf_earlyexit.calibration.search import single_threshold_curve
from hf_earlyexit.problem_types import row_quality
from hf_earlyexit.training.metrics import EXIT_METRICS

ROOT = Path(__file__).parent
TASK_METRIC = {"cola": "matthews", "mrpc": "f1"}
BUDGETS = np.linspace(1, 12, 111)
BOOTSTRAPS = 200

# name in the tables -> policy, its options, target, threshold per exit or one for all
SETTINGS = {
    "static": ("static", {}),
    "patience": ("patience", {}),
    "entropy": ("entropy", {}),
    "margin": ("margin", {}),
    "confidence": ("confidence", {}),
    "beem-c": ("beem-c", {}),
    "beem-a": ("beem-a", {}),
    "beem-c, log-odds": ("beem-c", {"vote": "log-odds"}),
    "beem-calibrated": ("beem-calibrated", {}),
}
TARGETS = {
    "no loss": (ee.MaxDrop(0.0), False),
    "no loss, one sigma": (ee.MaxDrop(0.0, sigmas=1.0), False),
    "per exit, paired": (ee.FinalLayerError(), True),
    "per exit, paired, one sigma": (ee.FinalLayerError(sigmas=1.0), True),
    "per exit, literal": (ee.FinalLayerError(paired=False), True),
}


def curve_on(policy: ee.policies.ExitPolicy, trace: ee.ExitTrace) -> np.ndarray:
    """Accuracy at every budget of mean layers, sweeping one threshold on these rows, `[len(BUDGETS)]`."""
    scores, answers = policy.scan(trace)
    visible = scores.double().numpy().copy()
    visible[:, list(policy.muted)] = -np.inf
    quality = row_quality(answers, trace.labels, trace.problem_type).numpy()
    cost = np.asarray(trace.costs)
    curve = single_threshold_curve(visible, quality, cost, policy.lowest_threshold, policy.counts)
    # budgets below the cheapest setting are met by mixing in rows that leave at the first exit
    costs, values = np.append(curve.cost, cost[0]), np.append(curve.quality, quality[:, 0].mean())
    order = np.lexsort((values, costs))
    return np.interp(BUDGETS, costs[order], values[order])


def oracle_on(trace: ee.ExitTrace) -> dict:
    right = trace.quality.numpy() > 0
    first = np.where(right.any(1), right.argmax(1), 11)
    return {"accuracy": float(right.any(1).mean()), "mean_layers": float((first + 1).mean())}


def one_run(folder: Path) -> dict:
    held = ee.ExitTrace.load(folder / "held-back.safetensors")
    report = ee.ExitTrace.load(folder / "report.safetensors")
    recipe = json.loads((folder / "train.json").read_text())
    metric = EXIT_METRICS.get(TASK_METRIC.get(recipe["task"], "accuracy"))
    policies, curves = {}, {}
    for name, (policy, options) in SETTINGS.items():
        points = {}
        for target, (wish, per_exit) in TARGETS.items():
            result = ee.calibrate(held, policy, wish, options=options, per_exit=per_exit)
            done = ee.replay(result.policy, report)
            index = [report.exit_layers.index(layer) for layer in done.exit_layer]
            answers = report.logits[np.arange(report.num_rows), index].numpy()
            points[target] = {
                "accuracy": done.quality, "difference": done.quality - done.full_quality, "error": done.standard_error,
                "mean_layers": done.mean_layers, "layer_speed_up": done.layer_speed_up,
                "task_metric": metric(answers, report.labels.numpy()), "shares": [e.share for e in done.exits],
                "held_back_difference": result.quality - result.full_quality,
            }  # fmt: skip
        curves[name] = curve_on(result.policy, report)
        policies[name] = {"points": points, "area": float(curves[name].mean())}
    rng = np.random.default_rng(0)
    resampled = {name: [] for name in SETTINGS}
    built = {name: ee.calibrate(held, p, ee.MaxDrop(0.0), options=o).policy for name, (p, o) in SETTINGS.items()}
    for _ in range(BOOTSTRAPS):
        rows = report.select(rng.integers(0, report.num_rows, report.num_rows))
        base = curve_on(built["confidence"], rows).mean()
        for name in SETTINGS:
            resampled[name].append(curve_on(built[name], rows).mean() - base)
    for name, values in resampled.items():
        policies[name]["area_over_confidence"] = float(np.mean(policies[name]["area"] - policies["confidence"]["area"]))
        policies[name]["area_over_confidence_95"] = [float(x) for x in np.percentile(values, [2.5, 97.5])]
        policies[name]["curve"] = [round(float(x), 4) for x in curves[name][::5]]
    return {
        "recipe": recipe,
        "accuracy_per_exit": report.quality.mean(0).tolist(),
        "full_task_metric": metric(report.logits[:, -1].numpy(), report.labels.numpy()),
        "weak_exits": [held.exit_layers[index] for index in held.dead_exits()],
        "oracle": oracle_on(report),
        "policies": policies,
    }


HEADER = """---
hide: [toc]
---

# Results

Generated by `python benchmarks/report.py` from `benchmarks/results/`; nothing here is typed by hand.

One 12-layer BERT (bge-small-en-v1.5: width 384) per task and seed, an exit after every layer (`linear-mean` heads),
all trained together with label loss and distillation weighted by depth. Thresholds and the policies' own numbers come
from rows held back from training; all figures are on report rows.

Thresholds and weights never saw the report rows, but choices about the comparison did. The form of `beem-calibrated` was
picked among many on earlier traces of this backbone that include the SST-2 dev rows. The *one sigma* columns and the share
of rows that teach a policy (0.2) were settled after SST-2 dev figures had been seen, and one shared offset for many classes
was tried and dropped on the report rows of several tasks. Read the lead of `beem-calibrated` and of the one-sigma columns as
flattered by that, on SST-2 most of all.

Each cell gives the change in accuracy against the last layer in points, the standard error of that paired difference in
brackets, and below them the layer speed-up (layers over mean layers, not time). The columns are ways to choose
thresholds on the held-back rows:

- *no loss*: one threshold for all exits, the cheapest without loss: `MaxDrop(0)`; *one sigma* keeps a standard
  error to spare.
- *per exit, paired*: each exit may err no more than the last layer on the rows it takes: `FinalLayerError()`.
- *per exit, literal*: BEEM's rule as published, errors against the last layer's error rate over all rows:
  `FinalLayerError(paired=False)`.

*Area* is mean accuracy over budgets of 1 to 12 mean layers (one threshold swept on the report rows); beside it the
difference to `confidence` in points, with a 95 % bootstrap interval over the report rows of the first seed. The plot shows
these differences.
"""


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def page(results: dict) -> str:
    lines = [HEADER, "![Each rule against confidence, task by task](results-policies.svg)", ""]
    for task, runs in results["tasks"].items():
        recipe, first = runs[0]["recipe"], runs[0]
        full = mean([run["accuracy_per_exit"][-1] for run in runs])
        metric = TASK_METRIC.get(task)
        told = f", {metric} {mean([r['full_task_metric'] for r in runs]):.4f}" if metric else ""
        exits = " ".join(f"{mean([r['accuracy_per_exit'][i] for r in runs]):.3f}" for i in range(12))
        lines += [
            f"## {task}",
            "",
            f"{recipe['train_rows']:,} rows trained, {recipe['held_back_rows']:,} held back, {recipe['report_rows']:,} of "
            f"`{recipe['report_split']}` reported; {recipe['epochs']} epochs; {len(runs)} seed{'s' * (len(runs) > 1)}. "
            f"Full model {full:.4f}{told}. Exits 1 to 12: {exits}. Weak exits (muted): "
            f"{', '.join(map(str, first['weak_exits'])) or 'none'}. Oracle: {first['oracle']['accuracy']:.4f} at "
            f"{first['oracle']['mean_layers']:.2f} layers.",
            "",
            f"| policy | {' | '.join(TARGETS)} | area | over confidence |",
            "|---" * (len(TARGETS) + 3) + "|",
        ]
        for name in SETTINGS:
            cells = []
            for target in TARGETS:
                points = [run["policies"][name]["points"][target] for run in runs]
                error = mean([p["error"] for p in points]) / len(points) ** 0.5
                change, speed = mean([p["difference"] for p in points]), mean([p["layer_speed_up"] for p in points])
                cells.append(f"{100 * change:+.2f} ({100 * error:.2f})<br>{speed:.2f}x")
            area = mean([run["policies"][name]["area"] for run in runs])
            over = mean([run["policies"][name]["area_over_confidence"] for run in runs])
            low, high = first["policies"][name]["area_over_confidence_95"]
            lines.append(
                f"| {name} | {' | '.join(cells)} | {area:.4f} | {100 * over:+.2f} ({100 * low:+.2f} to {100 * high:+.2f}) |"
            )
        lines.append("")
    lines += forms_section()
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, f"Made with {versions} on {results['machine']}.", ""])


def forms_section() -> list[str]:
    """The table of beem_forms.py, if it has been run."""
    path = ROOT / "results" / "beem_forms.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text())
    lines = [
        "## Forms of BEEM on SST-2",
        "",
        "One threshold without loss on held-back rows (`benchmarks/beem_forms.py`). "
        f"*Halves*: {found['halves']} random halves of all rows, chosen on one and judged on the other, "
        "which is steadier than the report rows alone (standard error of the "
        "mean in brackets; halves overlap, so it is on the low side).",
        "",
    ]
    for source, table in found["sources"].items():
        lines += [
            f"**{source}** ({table['rows_held_back']:,} held back, {table['rows_reported']:,} reported)",
            "",
            "| form | area | change | speed-up | halves: change | halves: speed-up |",
            "|---|---|---|---|---|---|",
        ]
        for name, form in table["forms"].items():
            halves = f"{100 * form['halves_change']:+.2f} ({100 * form['halves_change_error']:.2f})"
            lines.append(
                f"| {name} | {form['area']:.4f} | {100 * form['change']:+.2f} | {form['layer_speed_up']:.2f}x | {halves} "
                f"| {form['halves_speed_up']:.2f}x |"
            )
        lines.append("")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="?", help="folder of the runs; without it only the page is written")
    args = parser.parse_args()
    if args.runs is None:
        results = json.loads((ROOT / "results" / "glue.json").read_text())
        (ROOT.parent / "docs" / "results.md").write_text(page(results))
        return
    tasks = {}
    for name in TASKS:
        folders = [folder for folder in sorted(args.runs.glob(f"{name}-*")) if (folder / "train.json").exists()]
        if folders:
            tasks[name] = [one_run(folder) for folder in folders]
            print(name, len(folders), "runs")
    results = {
        "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "budgets": [round(float(x), 2) for x in BUDGETS[::5]],
        "tasks": tasks,
    }
    (ROOT / "results").mkdir(exist_ok=True)
    (ROOT / "results" / "glue.json").write_text(json.dumps(results, indent=1) + "\n")
    (ROOT.parent / "docs" / "results.md").write_text(page(results))


if __name__ == "__main__":
    main()
