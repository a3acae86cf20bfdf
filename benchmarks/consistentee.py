"""Exits learned by reward against every other rule, on the very same trained models and report rows.

    python benchmarks/consistentee.py build/glue --chosen build/chosen --control build/control --states build/states

reads the models that train_exits.py and train_chosen.py left (and writes nothing there), keeps pooled states and what gates
did on them in the states folder, and writes benchmarks/results/consistentee.json; consistentee_page.py makes the docs' page
and plot of it. A run that is in the JSON already is left as it is, except for what --again names.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from consistentee_page import OTHERS, write_page
from report import oracle_on
from safetensors.torch import load_file, save_file
from tasks import TASKS, load_rows
from train_exits import CROSS_HARDNESS
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
GATE_ROWS = 12_000  # that gates see in training, about, and three passes at least; on stackoverflow 12 passes change nothing
ALPHAS = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28)
BUDGETS = np.linspace(2, 9, 57)
RULES = {  # name in the tables -> policy, options it learns with
    **{name: (name, {}) for name in (*OTHERS, "reward")},
    "reward, four members": ("reward", {"members": 4}),
}
GATES_ON = {  # name in the tables -> kind of gate, estimator, hardness
    "gates, reinforce": ("mlp", "reinforce", "memorized"),
    "gates, exact": ("mlp", "exact", "memorized"),
    "gates, reinforce, one alpha for all": ("mlp", "reinforce", "none"),
    "gates, exact, one alpha for all": ("mlp", "exact", "none"),
    "gates, exact, logits beside the state": ("mlp+logits", "exact", "memorized"),
    "gates, exact, hardness of unseen rows": ("mlp", "exact", CROSS_HARDNESS),
}
RESERVES = {"none": 0.0, "one": 1.0}  # standard errors kept in reserve where a setting without loss is chosen
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
    """Every setting of one method, found on held-back rows.

    Args:
        held: on the rows that choose `[K, 3]`: mean layers, accuracy, standard error of its difference to the full model.
        report: on the report rows, the same.
    """

    def __init__(self, held: np.ndarray, report: np.ndarray) -> None:
        order = np.argsort(held[:, 0], kind="stable")
        self.held, self.report = held[order], report[order]

    def no_loss(self, sigmas: float) -> np.ndarray:
        """What the cheapest setting without loss on held-back rows does on report rows; the last setting is the full model.

        Args:
            sigmas: standard errors kept in reserve.
        """
        spare = self.held[:, 1] - sigmas * self.held[:, 2]
        return self.report[np.flatnonzero(spare >= self.held[-1, 1] - 1e-12)[0]]

    def at(self, budgets: np.ndarray, where: str = "report") -> np.ndarray:
        """Accuracy at budgets of mean layers; between two settings, of a mixture of both."""
        rows = getattr(self, where)
        order = np.argsort(rows[:, 0], kind="stable")
        return np.interp(budgets, rows[order, 0], rows[order, 1])


def ends(trace: ee.ExitTrace) -> np.ndarray:
    """Everybody at the first exit, and everybody at the last, `[2, 3]`."""
    return np.stack([outcome(trace, torch.full((trace.num_rows,), index)) for index in (0, trace.num_exits - 1)])


def outcome(trace: ee.ExitTrace, taken: torch.Tensor) -> np.ndarray:
    """Mean layers, accuracy and standard error of its difference to the full model, where rows leave at these exits."""
    quality = trace.quality.double()
    own = quality.gather(1, taken[:, None])[:, 0]
    error = (own - quality[:, -1]).std(correction=0) / trace.num_rows**0.5
    return np.array([float(torch.tensor(trace.costs)[taken].mean()), float(own.mean()), float(error)])


def visible(policy: ee.policies.ExitPolicy, trace: ee.ExitTrace) -> np.ndarray:
    """Scores `[N, E]`, -inf where the policy does not look."""
    scores = policy.scan(trace).scores.double().numpy().copy()
    scores[:, list(policy.muted)] = -np.inf
    return scores


def swept(scores: np.ndarray, trace: ee.ExitTrace, levels: np.ndarray) -> np.ndarray:
    """What every threshold does, and both ends, `[K, 3]`."""
    cost, quality = np.broadcast_to(np.asarray(trace.costs), scores.shape), trace.quality.double().numpy()
    gain = quality - quality[:, -1:]
    layers, own, mean, square = sweep(scores, (cost, quality, gain, gain**2), levels)
    error = np.sqrt((square - mean**2).clip(0) / len(scores))
    return np.concatenate([np.stack([layers, own, error], 1), ends(trace)])


def of_rule(name: str, held: ee.ExitTrace, report: ee.ExitTrace) -> Settings:
    """The rule with or without its weak exits, whichever does better on held-back rows.

    A rule that learns is taught by some of the held-back rows and set on the others.
    """
    policy, options = RULES[name]
    taught = chosen = held
    if POLICIES.get(policy).learns:
        order = torch.randperm(held.num_rows, generator=torch.Generator().manual_seed(0))
        count = round(LEARNING_SHARE * held.num_rows)
        taught, chosen = held.select(order[:count]), held.select(order[count:])
    forms = [
        of_policy(POLICIES.get(policy).from_trace(taught, muted=muted, **options), chosen, report)
        for muted in {(), held.dead_exits()}
    ]  # fmt: skip
    return max(forms, key=lambda form: form.at(BUDGETS, "held").mean())


def of_policy(policy: ee.policies.ExitPolicy, held: ee.ExitTrace, report: ee.ExitTrace) -> Settings:
    """Every threshold that makes a difference on held-back rows."""
    scores = visible(policy, held)
    levels = candidates(scores[:, :-1], policy.lowest_threshold, policy.counts)
    return Settings(swept(scores, held, levels), swept(visible(policy, report), report, levels))


def of_gates(folder: Path, cache: Path) -> tuple[dict[str, Settings], dict[str, list[dict]]]:
    """Gates taught on training rows, a setting for each alpha at one half, and what each does on held-back rows."""
    states, file = states_of(folder, cache), cache / f"{folder.name}-gates.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    found, told = {}, {}
    for name, (kind, estimator, hardness) in GATES_ON.items():
        if hardness == CROSS_HARDNESS and not (folder / CROSS_HARDNESS).exists():
            continue
        for alpha in ALPHAS:
            if f"{name}, {alpha}" not in known:
                gates = taught_gates(states["train"], kind, estimator, hardness_of(states["train"], folder, hardness), alpha)
                known[f"{name}, {alpha}"] = judged_at_one_half(states, gates)
                file.write_text(json.dumps(known, indent=1) + "\n")
        points = [known[f"{name}, {alpha}"] for alpha in ALPHAS]
        found[name] = Settings(
            *(np.array([*(p[split] for p in points), *ends(states[split].trace)]) for split in ("held-back", "report"))
        )
        told[name] = [{"alpha": alpha, **point} for alpha, point in zip(ALPHAS, points, strict=True)]
    return found, told


def hardness_of(data: GateStates, folder: Path, hardness: str) -> torch.Tensor:
    """Hardness of the train rows, by these exits or by models that never saw them."""
    if hardness != CROSS_HARDNESS:
        return HARDNESS.get(hardness)(data.outcomes)
    table = ee.training.HardnessTable.load(folder / CROSS_HARDNESS)
    table.require_exactly(range(len(data.states)))
    return table.of(range(len(data.states)))


def taught_gates(data: GateStates, kind: str, estimator: str, hardness: torch.Tensor, alpha: float) -> torch.nn.ModuleDict:
    recipe = GateRecipe(epochs=max(3, round(GATE_ROWS / len(data.states))), batch_size=64, learning_rate=1e-3)
    width, classes = data.states.shape[-1], data.trace.logits.shape[-1]
    torch.manual_seed(0)
    layers = range(1, data.trace.num_exits)
    gates = torch.nn.ModuleDict({str(layer): GATES.get(kind)(width, classes) for layer in layers})
    objective = ConsistentObjective(alpha=alpha, estimator=estimator)
    train_gates(gates, data, hardness, row_keys(range(len(data.states))), objective, recipe)
    return gates


def judged_at_one_half(states: dict[str, GateStates], gates: torch.nn.ModuleDict) -> dict:
    """What gates do at one half on held-back and report rows, and the share of report rows at each exit."""
    point = {}
    for split in ("held-back", "report"):
        trace = states[split].judged(gates)
        policy = ee.policies.GatePolicy.half(trace.num_exits)
        point[split] = outcome(trace, policy.decide(policy.scan(trace).scores)).tolist()
    return point | {"shares": [exit.share for exit in ee.replay(policy, trace).exits]}


def traces_of(folder: Path) -> tuple[ee.ExitTrace, ee.ExitTrace]:
    """Held-back and report rows, as this model sees them."""
    task = TASKS[folder.name.rsplit("-", 1)[0]]
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), load_rows(task)
    held, report = (
        ee.collect_trace(model, rows[split], tokenizer=tokenizer, max_length=task.max_length, progress=False)
        for split in ("held-back", "report")
    )
    return held, report


def of_chosen(held: ee.ExitTrace, report: ee.ExitTrace) -> dict[str, Settings]:
    """A model whose exits learned where rows leave: its own gates at every threshold, and confidence on it."""
    half = ee.policies.GatePolicy.half(held.num_exits)
    taken = [outcome(trace, half.decide(half.scan(trace).scores))[None] for trace in (held, report)]
    return {
        "chosen exits at one half": Settings(*taken),
        "chosen exits": of_policy(half, held, report),
        "confidence on chosen exits": of_rule("confidence", held, report),
    }


def summary(settings: Settings, full: float, layers: int) -> dict:
    """The figures of one method: at no loss with none and one standard error in reserve, and over budgets."""
    alone = len(settings.held) == 1
    values = {}
    for name, sigmas in RESERVES.items():
        cost, quality, _ = settings.report[0] if alone else settings.no_loss(sigmas)
        values[name] = {"mean_layers": cost, "layer_speed_up": layers / cost, "difference": quality - full}
    curve = None if alone else settings.at(BUDGETS) - full
    return values | {
        "area": None if alone else float(curve.mean()),
        "curve": None if alone else [round(float(value), 5) for value in curve],
    }  # fmt: skip


def one_run(folder: Path, chosen: Path, control: Path, cache: Path) -> dict:
    states = states_of(folder, cache)
    held, report = states["held-back"].trace, states["report"].trace
    found: dict[str, Settings] = {name: of_rule(name, held, report) for name in RULES}
    on_gates, gates = of_gates(folder, cache)
    found |= on_gates
    rows = {split: len(part.states) for split, part in states.items()}
    rivals = {"start": {name: found[name] for name in OTHERS}}
    if (chosen / "train.json").exists():
        found |= of_chosen(*traces_of(chosen))
        rows["chosen"] = json.loads((chosen / "train.json").read_text())["train_rows"]
    if (control / "train.json").exists():
        traces = traces_of(control)
        rivals["control"] = {name: of_rule(name, *traces) for name in OTHERS}
        found["control, all layers"] = Settings(*(ends(trace)[-1:] for trace in traces))
        found["confidence on control"] = rivals["control"]["confidence"]
    full = float(report.quality[:, -1].mean())
    methods = {name: summary(settings, full, report.num_exits) for name, settings in found.items()}
    for values in methods.values():  # every rule at this one's layers without loss
        for reserve in RESERVES:
            budget = np.array([values[reserve]["mean_layers"]])
            values[reserve]["others_there"] = {
                where: {name: float(settings.at(budget)[0]) - full for name, settings in rules.items()}
                for where, rules in rivals.items()
            }
    told = " ".join(
        f"{n}: {100 * v['none']['difference']:+.1f} {v['none']['layer_speed_up']:.2f}x" for n, v in methods.items()
    )
    print(folder.name, told, flush=True)
    return {
        "rows": rows,
        "full_accuracy": full,
        "standard_error": float(report.quality[:, -1].double().std() / report.num_rows**0.5),
        "train_accuracy_per_exit": states["train"].trace.quality.mean(0).tolist(),
        "accuracy_per_exit": report.quality.mean(0).tolist(),
        "oracle": oracle_on(report),
        "control_areas": {name: float(s.at(BUDGETS).mean()) - full for name, s in rivals.get("control", {}).items()},
        "methods": methods,
        "gates": gates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--chosen", type=Path, default=Path("build/chosen"))
    parser.add_argument("--control", type=Path, default=Path("build/control"))
    parser.add_argument("--states", type=Path, default=Path("build/states"))
    parser.add_argument("--tasks", nargs="*", default=sorted(TASKS), choices=sorted(TASKS))
    parser.add_argument("--again", nargs="*", default=[], help="runs to make anew, such as rte-0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for task in args.tasks:
        for folder in sorted(args.models.glob(f"{task}-*")):
            if (folder / "train.json").exists() and (folder.name not in runs or folder.name in args.again):
                runs[folder.name] = one_run(folder, args.chosen / folder.name, args.control / folder.name, args.states)
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
