"""Gates learned by reward against every other rule, on the very same trained models and report rows.

    python benchmarks/consistentee.py build/glue --states build/states [--tasks sst2 rte]

reads the models that train_exits.py left (and writes nothing there), collects pooled states once per split into the states
folder, teaches gates with the network held still, and writes benchmarks/results/consistentee.json and
docs/results-consistentee.md. A run that is in the JSON already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from report import oracle_on
from safetensors.torch import load_file, save_file
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.calibration.search import single_threshold_curve
from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.noise import row_keys
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.training.gates import GateRecipe, train_gates
from hf_earlyexit.training.hardness import HARDNESS
from hf_earlyexit.training.states import GateStates, collect_states

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "consistentee.json", ROOT.parent / "docs" / "results-consistentee.md"
MOST_TRAIN_ROWS = 8000
ALPHAS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.2)
BUDGETS = np.linspace(3, 9, 61)
RIVALS = ("static", "patience", "entropy", "confidence", "beem-c", "beem-a", "beem-calibrated")
VARIANTS = {  # name in the tables -> rows the gates learn from, kind of gate, estimator, hardness
    "paper's form": ("train", "mlp", "reinforce", "memorized"),
    "exact": ("train", "mlp", "exact", "memorized"),
    "exact, one alpha for all": ("train", "mlp", "exact", "none"),
    "exact, gates see logits": ("train", "mlp+logits", "exact", "memorized"),
    "held-back rows": ("held-back", "mlp", "exact", "memorized"),
    "held-back rows, reinforce": ("held-back", "mlp", "reinforce", "memorized"),
    "held-back rows, gates see logits": ("held-back", "mlp+logits", "exact", "memorized"),
}
RECIPES = {  # the same number of steps, roughly, whatever the rows
    "train": lambda rows: GateRecipe(epochs=max(3, round(24_000 / rows)), batch_size=64, learning_rate=1e-3),
    "held-back": lambda rows: GateRecipe(epochs=max(10, min(60, round(24_000 / rows))), batch_size=64, learning_rate=1e-3),
}


def states_of(folder: Path, cache: Path) -> dict[str, GateStates]:
    """States of train (at most MOST_TRAIN_ROWS), held-back and report rows, kept as float16."""
    task, found, parts = TASKS[folder.name.rsplit("-", 1)[0]], {}, None
    for split in ("train", "held-back", "report"):
        file = cache / f"{folder.name}-{split}.safetensors"
        if not file.exists():
            parts = parts or load_rows(task)
            rows = parts[split]
            if split == "train" and len(rows) > MOST_TRAIN_ROWS:
                rows = rows.shuffle(seed=1).select(range(MOST_TRAIN_ROWS))
            model = ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            made = collect_states(model, rows, tokenizer=tokenizer, max_length=task.max_length, progress=False)
            cache.mkdir(parents=True, exist_ok=True)
            tensors = {"states": made.states.half(), "logits": made.trace.logits, "labels": made.trace.labels}
            save_file({name: value.contiguous() for name, value in tensors.items()}, file)
        read = load_file(file)
        layers = tuple(range(1, read["logits"].shape[1] + 1))
        trace = ee.ExitTrace(logits=read["logits"], labels=read["labels"], exit_layers=layers, split=split)
        found[split] = GateStates(states=read["states"].float(), trace=trace)
    return found


def curve_on(policy: ee.ExitPolicy, trace: ee.ExitTrace, budgets: np.ndarray) -> np.ndarray:
    """Accuracy at budgets of mean layers, sweeping one threshold on these rows."""
    scores, answers = policy.scan(trace)
    visible = scores.double().numpy().copy()
    visible[:, list(policy.muted)] = -np.inf
    quality = (answers.argmax(-1) == trace.labels[:, None]).double().numpy()
    curve = single_threshold_curve(visible, quality, np.asarray(trace.costs), policy.lowest_threshold, policy.counts)
    costs, values = np.append(curve.cost, trace.costs[0]), np.append(curve.quality, quality[:, 0].mean())
    order = np.lexsort((values, costs))
    return np.interp(budgets, costs[order], values[order])


def taught(kind: str, data: GateStates, hardness: str, objective: ConsistentObjective, recipe: GateRecipe, seed: int):
    torch.manual_seed(seed)
    exits, width, classes = data.trace.num_exits, data.states.shape[-1], data.trace.logits.shape[-1]
    gates = torch.nn.ModuleDict({str(layer): GATES.get(kind)(width, classes) for layer in range(1, exits)})
    rows = row_keys(range(len(data.states)))
    train_gates(gates, data, HARDNESS.get(hardness)(data.trace), rows, objective, recipe)
    return gates


def one_run(folder: Path, cache: Path) -> dict:
    states = states_of(folder, cache)
    held, report = states["held-back"].trace, states["report"].trace
    half = torch.arange(held.num_rows) % 2 == 0  # these teach gates, the others choose alpha
    states["held-back"] = GateStates(states=states["held-back"].states[half], trace=held.select(half))
    full = float(report.quality[:, -1].mean())
    rules = {name: ee.calibrate(held, name, ee.MaxDrop(0.0)).policy for name in RIVALS}
    variants = {}
    for name, (rows, kind, estimator, hardness) in VARIANTS.items():
        data, points = states[rows], []
        for alpha in ALPHAS:
            objective = ConsistentObjective(alpha=alpha, estimator=estimator)
            gates = taught(kind, data, hardness, objective, RECIPES[rows](len(data.states)), seed=0)
            judged = states["report"].judged(gates)
            done = ee.replay(ee.GatePolicy.half(report.num_exits), judged)
            budget = np.array([done.mean_layers])
            points.append({
                "alpha": alpha, "mean_layers": done.mean_layers, "layer_speed_up": done.layer_speed_up,
                "difference": done.quality - full, "error": done.standard_error,
                "shares": [exit.share for exit in done.exits],
                "rivals": {rival: float(curve_on(rule, report, budget)[0]) - full for rival, rule in rules.items()},
                "threshold_curve": float(curve_on(ee.GatePolicy.half(report.num_exits), judged, BUDGETS).mean()) - full,
            })  # fmt: skip
        variants[name] = points
        told = " ".join(
            f"{p['mean_layers']:.1f}:{100 * p['difference']:+.1f}({100 * p['rivals']['confidence']:+.1f})" for p in points
        )
        print(folder.name, name, told, flush=True)
    return {
        "run": folder.name,
        "rows": {split: len(part.states) for split, part in states.items()},
        "full_accuracy": full,
        "train_accuracy_per_exit": states["train"].trace.quality.mean(0).tolist(),
        "accuracy_per_exit": report.quality.mean(0).tolist(),
        "oracle": oracle_on(report),
        "rival_curves": {name: float(curve_on(rule, report, BUDGETS).mean()) - full for name, rule in rules.items()},
        "variants": variants,
    }


HEADER = """# Results of gates learned by reward

Generated by `python benchmarks/consistentee.py` from `benchmarks/results/consistentee.json`; nothing here is typed by hand.

The models are those of the [results page](results.md), held still; only gates were taught, on pooled states collected once:
at most {rows:,} training rows, or every other held-back row. Each line is one kind of gates, each entry another alpha, with
threshold one half: **mean layers: change of accuracy against the last layer in points** on the report rows, on which nothing
was tuned. Below them, what the other rules reach *at the same mean layers as the first line's entries*, one threshold swept
on the report rows. The last column is the mean change over 3 to 9 mean layers: for gates over thresholds at alpha {middle}.
The standard error of a change is about {error:.1f} points.
"""


def page(results: dict) -> str:
    runs = list(results["runs"].values())
    error = np.mean([p["error"] for run in runs for points in run["variants"].values() for p in points])
    middle = ALPHAS[len(ALPHAS) // 2]
    lines = [HEADER.format(rows=MOST_TRAIN_ROWS, middle=middle, error=100 * error)]
    for run in runs:
        rows, oracle = run["rows"], run["oracle"]
        lines += [
            f"## {run['run']}", "",
            f"{rows['train']:,} training rows, {rows['held-back']:,} held-back rows teach, {rows['report']:,} reported. "
            f"Full model {run['full_accuracy']:.4f}; oracle {oracle['accuracy']:.4f} at {oracle['mean_layers']:.2f} layers.",
            "",
            "| |" + "".join(f" alpha {alpha} |" for alpha in ALPHAS) + " 3 to 9 layers |",
            "|---|" + "---|" * (len(ALPHAS) + 1),
        ]  # fmt: skip
        for name, points in run["variants"].items():
            cells = "".join(f" {p['mean_layers']:.2f}: {100 * p['difference']:+.1f} |" for p in points)
            lines.append(f"| {name} |{cells} {100 * points[len(ALPHAS) // 2]['threshold_curve']:+.2f} |")
        for rival in RIVALS:
            first = next(iter(run["variants"].values()))
            cells = "".join(f" {100 * p['rivals'][rival]:+.1f} |" for p in first)
            lines.append(f"| *{rival}* |{cells} {100 * run['rival_curves'][rival]:+.2f} |")
        lines.append("")
    lines += ["## Against each rule at the same mean layers", ""]
    lines += [
        "Mean difference in points over all runs and alphas whose gates use 2 to 10 mean layers; above 0, the gates win.",
        "",
    ]
    lines += ["| |" + "".join(f" {rival} |" for rival in RIVALS), "|---|" + "---|" * len(RIVALS)]
    for name in VARIANTS:
        points = [p for run in runs for p in run["variants"][name] if 2 <= p["mean_layers"] <= 10]
        cells = "".join(f" {100 * np.mean([p['difference'] - p['rivals'][r] for p in points]):+.2f} |" for r in RIVALS)
        lines.append(f"| {name} |{cells}")
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", f"Made with {versions} on {results['machine']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--states", type=Path, default=Path("build/states"))
    parser.add_argument("--tasks", nargs="+", default=sorted(TASKS), choices=sorted(TASKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for task in args.tasks:
        for folder in sorted(args.models.glob(f"{task}-*")):
            if (folder / "train.json").exists() and folder.name not in runs:
                runs[folder.name] = one_run(folder, args.states)
    results = {
        "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "runs": dict(sorted(runs.items())),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
