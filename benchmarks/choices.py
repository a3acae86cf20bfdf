"""What to choose first: the figures of the decision guide and of the start page, from committed results and cached traces.

    python benchmarks/choices.py          # replays the traces below HF_EARLYEXIT_DATA, then writes everything
    python benchmarks/choices.py --page   # only writes docs/, from the committed results

writes benchmarks/results/choices.json, the measured part of docs/how-to/choose.md, and the plots docs/benefit-quality.svg,
docs/benefit-time.svg and docs/results-policies.svg. Nothing in them is drawn or typed by hand.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from speed_page import STATIC

import hf_earlyexit as ee
from hf_earlyexit.measuring.ways import EARLY
from hf_earlyexit.plots.style import COLOURS, SERIES, calm, figure, to_svg

ROOT = Path(__file__).parent
DOCS = ROOT.parent / "docs"
GUIDE = DOCS / "how-to" / "choose.md"
START, END = "<!-- measured: written by benchmarks/choices.py -->", "<!-- end of what is measured -->"
TRACES = ("mean-pooled", "first-token")
COUNTS = (100, 200, 500, 1000, 2000)
DRAWS = 40
RULES = {
    "confidence": ("confidence", {}),
    "entropy": ("entropy", {}),
    "margin": ("margin", {}),
    "beem-a": ("beem-a", {}),
    "beem-c": ("beem-c", {}),
    "beem-calibrated": ("beem-calibrated", {}),
    "patience": ("patience", {}),
}
TARGETS = {"max-drop:0.01": ee.MaxDrop(0.01), "max-drop:0.01, one sigma": ee.MaxDrop(0.01, sigmas=1.0)}
COMPARED = ("beem-a", "beem-c", "beem-calibrated", "patience", "static")


def whole_trace(heads: str) -> ee.ExitTrace:
    """All rows of a cached trace that did not train the exits."""
    folder = Path(os.environ.get("HF_EARLYEXIT_DATA", "../shared/data")) / "traces"
    tensors = load_file(folder / f"sst2_bge-small_{heads}.safetensors")
    parts = ("heldback", "dev")
    return ee.ExitTrace(
        logits=torch.cat([tensors[f"{part}_logits"] for part in parts]),
        labels=torch.cat([tensors[f"{part}_labels"] for part in parts]),
        exit_layers=tuple(range(1, 13)),
    )


def draws(trace: ee.ExitTrace, policy: str, options: dict, target: ee.MaxDrop, count: int) -> dict:
    """Thresholds chosen on `count` random rows and judged on all others, `DRAWS` times."""
    lost, speed = [], []
    for seed in range(DRAWS):
        order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(seed))
        result = ee.calibrate(trace.select(order[:count]), policy, target, options=options, seed=seed)
        done = ee.replay(result.policy, trace.select(order[count:]))
        lost.append(done.full_quality - done.quality)
        speed.append(done.layer_speed_up)
    return {
        "lost": float(np.mean(lost)),
        "lost_90": float(np.percentile(lost, 90)),
        "kept": float(np.mean(np.asarray(lost) <= target.drop)),
        "layer_speed_up": float(np.mean(speed)),
    }


def measure() -> dict:
    """Everything that is replayed: how many rows, and which rule, on the cached traces."""
    rows: dict = {}
    rules: dict = {}
    for heads in TRACES:
        trace = whole_trace(heads)
        rows[heads] = {
            name: {str(count): draws(trace, "confidence", {}, target, count) for count in COUNTS}
            for name, target in TARGETS.items()
        }
        rules[heads] = {
            name: draws(trace, policy, options, TARGETS["max-drop:0.01"], 1000) for name, (policy, options) in RULES.items()
        }
        print(heads, "done", flush=True)
    versions = {name: version(name) for name in ("hf_earlyexit", "torch")}
    return {"versions": versions, "draws": DRAWS, "trace_rows": trace.num_rows, "rows": rows, "rules": rules}


def verdict(low: float, high: float) -> str:
    return "ahead" if low > 0 else "behind" if high < 0 else "level"


def rule_table(tasks: dict) -> list[str]:
    """Each rule's area over that of confidence, task by task; bold where the interval leaves out 0."""
    lines = [f"| task | {' | '.join(COMPARED)} |", "|---" * (len(COMPARED) + 1) + "|"]
    counts = {name: {"ahead": 0, "level": 0, "behind": 0} for name in COMPARED}
    for task, runs in tasks.items():
        cells = []
        for name in COMPARED:
            policy = runs[0]["policies"][name]
            low, high = policy["area_over_confidence_95"]
            word = verdict(low, high)
            counts[name][word] += 1
            cells.append(f"{100 * policy['area_over_confidence']:+.2f} ({word})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    totals = [f"{c['ahead']} ahead, {c['level']} level, {c['behind']} behind" for c in counts.values()]
    return [*lines, f"| **of {len(tasks)} tasks** | {' | '.join(totals)} |"]


def points(value: float) -> str:
    """A loss of quality in points."""
    return f"{100 * value:.2f}"


def guide_section(glue: dict, choices: dict) -> str:
    """The measured part of the decision guide."""
    held, heads = choices["rows"], {"mean-pooled": "exits that all know something", "first-token": "blind lower exits"}
    lines = [
        START,
        "",
        "**Which rule.** Mean accuracy over all layer budgets, against `confidence`, in points of accuracy. A rule is "
        "*ahead* or *behind* where the 95 % interval over the reported rows leaves out 0, else *level*; one model "
        "a task.",
        "",
        *rule_table(glue["tasks"]),
        "",
        f"**Which rule, once more.** Two cached traces of SST-2 ({choices['trace_rows']:,} rows each): thresholds for a "
        f"drop of one point chosen on 1,000 rows and judged on all others, mean of {choices['draws']} draws.",
        "",
        "| rule | " + " | ".join(f"{heads[name]}: points lost | layer speed-up" for name in TRACES) + " |",
        "|---" * (2 * len(TRACES) + 1) + "|",
    ]
    for rule in RULES:
        cells = [
            f"{points(choices['rules'][name][rule]['lost'])} | {choices['rules'][name][rule]['layer_speed_up']:.2f}x"
            for name in TRACES
        ]
        lines.append(f"| `{rule}` | {' | '.join(cells)} |")
    lines += [
        "",
        "**How many rows.** The same traces, rule `confidence`, a permitted drop of one point: how often the drop was kept "
        f"on the rows that did not choose, and what was lost there, mean and worst tenth of {choices['draws']} draws.",
        "",
        "| exits | rows that choose | kept | points lost | worst tenth | layer speed-up | "
        "kept with `sigmas=1` | layer speed-up |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain, careful = TARGETS
    for name in TRACES:
        for count in COUNTS:
            one, two = held[name][plain][str(count)], held[name][careful][str(count)]
            lines.append(
                f"| {heads[name]} | {count:,} | {one['kept']:.0%} | {points(one['lost'])} | {points(one['lost_90'])} | "
                f"{one['layer_speed_up']:.2f}x | {two['kept']:.0%} | {two['layer_speed_up']:.2f}x |"
            )
    versions = ", ".join(f"{name} {number}" for name, number in choices["versions"].items())
    return "\n".join([*lines, "", f"Made with {versions}.", "", END])


def benefit_quality(glue: dict) -> str:
    """What each mean number of layers costs in accuracy, a line for each task."""
    with figure(5.6, 3.8) as (drawing, axes):
        calm(axes, xlabel="mean layers per text, of 12", ylabel="points of accuracy against the full model")
        axes.axhline(0, color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (1, 2)))
        for number, (task, runs) in enumerate(glue["tasks"].items()):
            curve = np.asarray(runs[0]["policies"]["confidence"]["curve"])
            change = 100 * (curve - runs[0]["accuracy_per_exit"][-1])
            axes.plot(glue["budgets"], change, color=SERIES[number % len(SERIES)], linewidth=1.6, label=task)
        axes.set(xlim=(0, 12.2), ylim=(-20, 2))
        drawing.legend(loc="outside lower center", ncols=4, handlelength=1.6)
        return to_svg(drawing, "Accuracy lost against mean layers, by task, with the rule confidence")


def benefit_time(speed: dict) -> str:
    """Measured speed and accuracy of full models, shallower ones, and early exit."""
    with figure(6.6, 3.6) as (drawing, axes):
        names, place = [], 0.0
        for task, found in speed["trained"].items():
            many, report = found["timed"]["throughput"][STATIC], found["forms"][STATIC]["report"]
            for way in sorted(report, key=lambda way: many[way]["speed_up"]):
                ratio = many[way]["speed_up"]
                axes.barh(place, ratio, 0.62, color=SERIES[0] if way == EARLY else COLOURS["muted"])
                label = f"{ratio:.2f}x, accuracy {100 * report[way]['accuracy']:.1f} %"
                axes.text(ratio + 0.04, place, label, va="center", color=COLOURS["ink"])
                names.append((place, f"{task}: {way}"))
                place += 1
            place += 0.5
        axes.set_yticks(*map(list, zip(*names, strict=True)))
        axes.set(xlabel="measured speed in 8 bits, ONNX Runtime's own full model = 1", xlim=(0, 4.9))
        return to_svg(drawing, "Measured speed and accuracy: full models, shallower ones, early exit")


def rules_plot(glue: dict) -> str:
    """Each rule's lead over confidence, with its interval, task by task."""
    tasks = list(glue["tasks"])
    with figure(7.6, 4.4) as (drawing, axes):
        calm(axes, xlabel="mean accuracy over all budgets, against confidence, in points")
        axes.grid(visible=True, axis="x")
        axes.axvline(0, color=COLOURS["ink"], linewidth=0.9)
        for number, name in enumerate(COMPARED):
            values = [glue["tasks"][task][0]["policies"][name] for task in tasks]
            middle = np.asarray([100 * one["area_over_confidence"] for one in values])
            ends = 100 * np.asarray([one["area_over_confidence_95"] for one in values]).T
            places = np.arange(len(tasks)) + 0.14 * (number - (len(COMPARED) - 1) / 2)
            axes.errorbar(middle, places, xerr=np.abs(ends - middle), fmt="o", markersize=4, color=SERIES[number],
                          elinewidth=1.1, label=name)  # fmt: skip
        axes.set_yticks(range(len(tasks)), tasks)
        axes.invert_yaxis()
        drawing.legend(loc="outside lower center", ncols=len(COMPARED), handlelength=1.4)
        return to_svg(drawing, "Each rule's mean accuracy over all budgets against confidence, with 95 % intervals")


def pages(glue: dict, speed: dict, choices: dict) -> dict[Path, str]:
    """Every file that is made from the results, by its path."""
    text = GUIDE.read_text(encoding="utf-8")
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    return {
        GUIDE: before + guide_section(glue, choices) + after,
        DOCS / "benefit-quality.svg": benefit_quality(glue),
        DOCS / "benefit-time.svg": benefit_time(speed),
        DOCS / "results-policies.svg": rules_plot(glue),
    }


def committed() -> tuple[dict, dict, dict]:
    return tuple(json.loads((ROOT / "results" / f"{name}.json").read_text()) for name in ("glue", "speed", "choices"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only write the pages, from the committed results")
    if not parser.parse_args().page:
        (ROOT / "results" / "choices.json").write_text(json.dumps(measure(), indent=1) + "\n")
    for path, text in pages(*committed()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
