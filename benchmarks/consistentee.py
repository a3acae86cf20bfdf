"""Exits learned by reward against every other rule, on the very same trained models and report rows.

    python benchmarks/consistentee.py build/glue --chosen build/chosen --states build/states [--tasks sst2 rte]

reads the models that train_exits.py and train_chosen.py left (and writes nothing there), collects pooled states once per
split into the states folder, and writes benchmarks/results/consistentee.json; consistentee_page.py makes the docs' page and
plot of it. A run that is in the JSON already is left as it is, except for what --again names.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from consistentee_page import write_page
from report import oracle_on
from safetensors.torch import load_file, save_file
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.calibration.search import candidates, sweep
from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.noise import row_keys
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.training.gates import GateRecipe, train_gates
from hf_earlyexit.training.hardness import HARDNESS
from hf_earlyexit.training.states import GateStates, collect_states

RESULTS = Path(__file__).parent / "results" / "consistentee.json"
MOST_TRAIN_ROWS = 8000
UPDATES = 12_000  # rows the gates see, about
ALPHAS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
BUDGETS = np.linspace(2, 9, 57)
RULES = ("static", "patience", "entropy", "confidence", "beem-c", "beem-a", "beem-calibrated", "reward")
GATES_ON = {  # name in the tables -> kind of gate, estimator, hardness
    "gates, reinforce": ("mlp", "reinforce", "memorized"),
    "gates, exact": ("mlp", "exact", "memorized"),
    "gates, reinforce, one alpha for all": ("mlp", "reinforce", "none"),
    "gates, exact, one alpha for all": ("mlp", "exact", "none"),
}
LEARNING_SHARE = 0.5  # of the held-back rows, for rules that learn


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


class Settings:
    """Every setting of one method, found on held-back rows: mean layers and accuracy there and on the report rows.

    Args:
        held, report: `[K, 2]` each, mean layers and accuracy; the last setting is the full model.
    """

    def __init__(self, held: np.ndarray, report: np.ndarray) -> None:
        self.full = held[-1, 1]  # on the rows that choose, which are fewer where others teach
        order = np.argsort(held[:, 0], kind="stable")
        self.held, self.report = held[order], report[order]

    def no_loss(self) -> np.ndarray:
        """What the cheapest setting without loss on held-back rows does on report rows."""
        return self.report[np.flatnonzero(self.held[:, 1] >= self.full)[0]]

    def at(self, budgets: np.ndarray, where: str = "report") -> np.ndarray:
        """Accuracy at budgets of mean layers; between two settings, of a mixture of both."""
        rows = getattr(self, where)
        order = np.argsort(rows[:, 0], kind="stable")
        return np.interp(budgets, rows[order, 0], rows[order, 1])


def ends(trace: ee.ExitTrace) -> np.ndarray:
    """Everybody at the first exit, and everybody at the last."""
    quality = trace.quality.mean(0).tolist()
    return np.array([[1.0, quality[0]], [trace.costs[-1], quality[-1]]])


def of_policy(policy: ee.ExitPolicy, held: ee.ExitTrace, report: ee.ExitTrace) -> Settings:
    """Every threshold that makes a difference on held-back rows."""
    visible = {}
    for name, trace in (("held", held), ("report", report)):
        visible[name] = policy.scan(trace).scores.double().numpy().copy()
        visible[name][:, list(policy.muted)] = -np.inf
    levels = candidates(visible["held"][:, :-1], policy.lowest_threshold, policy.counts)
    parts = []
    for name, trace in (("held", held), ("report", report)):
        cost = np.broadcast_to(np.asarray(trace.costs), visible[name].shape)
        pair = sweep(visible[name], (cost, trace.quality.double().numpy()), levels)
        parts.append(np.concatenate([np.stack(pair, 1), ends(trace)]))
    return Settings(*parts)


def of_rule(name: str, held: ee.ExitTrace, report: ee.ExitTrace) -> Settings:
    """The rule with or without its weak exits, whichever does better on held-back rows.

    A rule that learns is taught by some of the held-back rows and set on the others.
    """
    taught = chosen = held
    if POLICIES.get(name).learns:
        order = torch.randperm(held.num_rows, generator=torch.Generator().manual_seed(0))
        count = round(LEARNING_SHARE * held.num_rows)
        taught, chosen = held.select(order[:count]), held.select(order[count:])
    forms = [
        of_policy(POLICIES.get(name).from_trace(taught, muted=muted), chosen, report)
        for muted in {(), held.dead_exits()}
    ]  # fmt: skip
    return max(forms, key=lambda form: form.at(BUDGETS, "held").mean())


def of_gates(states: dict[str, GateStates], kind: str, estimator: str, hardness: str) -> tuple[Settings, list[dict]]:
    """Gates taught on training rows, a setting for each alpha at one half, and what each sends where."""
    data = states["train"]
    recipe = GateRecipe(epochs=max(3, round(UPDATES / len(data.states))), batch_size=64, learning_rate=1e-3)
    width, classes = data.states.shape[-1], data.trace.logits.shape[-1]
    points: dict[str, list] = {"held-back": [], "report": []}
    told = []
    for alpha in ALPHAS:
        torch.manual_seed(0)
        layers = range(1, data.trace.num_exits)
        gates = torch.nn.ModuleDict({str(layer): GATES.get(kind)(width, classes) for layer in layers})
        objective = ConsistentObjective(alpha=alpha, estimator=estimator)
        keys = row_keys(range(len(data.states)))
        train_gates(gates, data, HARDNESS.get(hardness)(data.trace), keys, objective, recipe)
        for split, found in points.items():
            done = ee.replay(ee.GatePolicy.half(data.trace.num_exits), states[split].judged(gates))
            found.append([done.mean_layers, done.quality])
        told.append({"alpha": alpha, "mean_layers": done.mean_layers, "accuracy": done.quality,
                     "shares": [exit.share for exit in done.exits]})  # fmt: skip
    held, report = (
        np.concatenate([points[split], ends(states[split].trace)]) for split in ("held-back", "report")
    )  # fmt: skip
    return Settings(held, report), told


def of_chosen(folder: Path, held: ee.ExitTrace, report: ee.ExitTrace) -> dict[str, Settings]:
    """A model whose exits learned where rows leave: its own gates at every threshold, and confidence on it."""
    task = TASKS[folder.name.rsplit("-", 1)[0]]
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, rows, traces = AutoTokenizer.from_pretrained(folder), load_rows(task), {}
    for split in ("held-back", "report"):
        traces[split] = ee.collect_trace(
            model, rows[split], tokenizer=tokenizer, max_length=task.max_length, progress=False
        )  # fmt: skip
    half = ee.GatePolicy.half(held.num_exits)
    found = {
        "chosen exits": of_policy(half, traces["held-back"], traces["report"]),
        "confidence on chosen exits": of_rule("confidence", traces["held-back"], traces["report"]),
    }
    done = [ee.replay(half, traces[split]) for split in ("held-back", "report")]
    found["chosen exits at one half"] = Settings(*(np.array([[d.mean_layers, d.quality]]) for d in done))
    return found


def summary(settings: Settings, full: float, layers: int) -> dict:
    """The figures of one method: at no loss, and over budgets."""
    alone = len(settings.held) == 1
    cost, quality = settings.report[0] if alone else settings.no_loss()
    curve = None if alone else settings.at(BUDGETS) - full
    return {
        "mean_layers": float(cost), "layer_speed_up": layers / float(cost), "difference": float(quality) - full,
        "area": None if alone else float(curve.mean()),
        "curve": None if alone else [round(float(value), 5) for value in curve],
    }  # fmt: skip


def one_run(folder: Path, chosen: Path, cache: Path) -> dict:
    states = states_of(folder, cache)
    held, report = states["held-back"].trace, states["report"].trace
    found: dict[str, Settings] = {name: of_rule(name, held, report) for name in RULES}
    gates = {}
    for name, kind in GATES_ON.items():
        found[name], gates[name] = of_gates(states, *kind)
    if (chosen / "train.json").exists():
        found |= of_chosen(chosen, held, report)
    full = float(report.quality[:, -1].mean())
    methods = {name: summary(settings, full, report.num_exits) for name, settings in found.items()}
    for values in methods.values():  # every method at this one's layers without loss
        budget = np.array([values["mean_layers"]])
        values["others_there"] = {
            name: float(settings.at(budget)[0]) - full for name, settings in found.items() if len(settings.held) > 1
        }
    told = " ".join(f"{n}: {100 * v['difference']:+.1f} {v['layer_speed_up']:.2f}x" for n, v in methods.items())
    print(folder.name, told, flush=True)
    return {
        "rows": {split: len(part.states) for split, part in states.items()},
        "full_accuracy": full,
        "standard_error": float(report.quality[:, -1].double().std() / report.num_rows**0.5),
        "train_accuracy_per_exit": states["train"].trace.quality.mean(0).tolist(),
        "accuracy_per_exit": report.quality.mean(0).tolist(),
        "oracle": oracle_on(report),
        "methods": methods,
        "gates": gates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--chosen", type=Path, default=Path("build/chosen"))
    parser.add_argument("--states", type=Path, default=Path("build/states"))
    parser.add_argument("--tasks", nargs="*", default=sorted(TASKS), choices=sorted(TASKS))
    parser.add_argument("--again", nargs="*", default=[], help="runs to make anew, such as rte-0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for task in args.tasks:
        for folder in sorted(args.models.glob(f"{task}-*")):
            if (folder / "train.json").exists() and (folder.name not in runs or folder.name in args.again):
                runs[folder.name] = one_run(folder, args.chosen / folder.name, args.states)
                save(runs)
    save(runs)
    write_page(json.loads(RESULTS.read_text()))


def save(runs: dict) -> None:
    results = {
        "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "alphas": ALPHAS,
        "budgets": [float(budget) for budget in BUDGETS],
        "learning_share": LEARNING_SHARE,
        "most_train_rows": MOST_TRAIN_ROWS,
        "runs": dict(sorted(runs.items())),
    }
    RESULTS.write_text(json.dumps(results, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
