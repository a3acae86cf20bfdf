"""Write the tables of docs/results-captioning.md from the committed figures.

python benchmarks/captioning_page.py whole frozen lossless
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results-captioning.md"
HEAD = (
    "| decoder | mean layers | layer speed-up | BLEU-1 | BLEU-4 | ROUGE-L | CIDEr | against full | against its own depth | "
    "decode time, batch 1 | batch 8 |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


OWN = "all layers: 12 of 12 layers"


def table(report: dict) -> str:
    """One row per setting; decoding time against the model's own full depth, with the middle half of the rounds."""
    lines = [HEAD]
    for name, row in report["rows"].items():
        apart = " | ".join(_difference(row.get(other)) for other in ("against_full", "against_own_depth"))
        clock = []
        for batch in ("batch 1", "batch 8"):
            timings = report["decode_time"][batch]
            reference = timings[OWN]["speed_up"] if OWN in timings else 1.0
            middle, low, high = (timings[name][key] / reference for key in ("speed_up", "low", "high"))
            clock.append(f"{middle:.2f}x ({low:.2f} to {high:.2f})")
        scores = " | ".join(f"{row[score]:.3f}" for score in ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr"))
        depth = f"{row['mean_layers']:.2f} | {row['layer_speed_up']:.2f}x"
        lines.append(f"| {name} | {depth} | {scores} | {apart} | {' | '.join(clock)} |")
    return "\n".join(lines)


def _difference(values: dict | None) -> str:
    return "" if values is None else f"{values['difference']:+.3f} ({values['standard_error']:.3f})"


def figures(report: dict) -> str:
    return (
        f"{table(report)}\n\n"
        f"Thresholds from {report['dev_photos']} photos of dev, figures on {report['test_photos']} of test, seed "
        f"{report['seed']}; in brackets a standard error over photos, or the middle half of {report['repeats']} rounds. A "
        f"vocabulary of {report['vocabulary']:,} words; one thread. Looking at a photo takes "
        f"{report['encoder_over_decode']:.2f} of the time the full decoder takes for its caption, at batch 1.\n"
    )


GOAL = 1.4
MODELS = {"whole": "exits that learned with the decoder", "tuned": "exits added later"}
RUNS = {
    "batch 1": "one photo at a time",
    "batch 1, fewest calls": "one at a time, chosen for calls",
    "batch 8": "eight at a time, the same setting as alone",
    "batch 8, fixed depth": "eight at a time, fixed depth",
}
RULES_HEAD = (
    "| rule | exit after layer | drafts that may wait | drafts a token | right | layer calls a token | "
    "expected time, plain over lossless |\n|---|---|---|---|---|---|---|"
)
RUNS_HEAD = (
    "| run | rule | photos | ids equal | calls a pass | fewer | drafts right | "
    "time, plain over lossless | layers called whole |\n|---|---|---|---|---|---|---|---|---|"
)


def lossless(reports: dict) -> str:
    """What lossless captions cost, of every captioner that was measured."""
    missing = [MODELS[name] for name in MODELS if name not in reports]
    left_out = f"Not measured: {', '.join(missing)}.\n\n" if missing else ""
    return left_out + "\n".join(_lossless(MODELS[name], reports[name]) for name in MODELS if name in reports)


def _lossless(title: str, report: dict) -> str:
    runs, layers, exits = report["runs"], report["exit_layers"][-1], report["exit_layers"][:-1]
    alone, eight, still = (runs[name] for name in ("batch 1", "batch 8", "batch 8, fixed depth"))
    plain, given = (report["scores"][way]["CIDEr"] for way in ("plain", "lossless"))
    first = [
        f"One photo at a time, lossless decoding makes {layers / alone['layer_calls_per_step']:.2f} times fewer calls of",
        f"layers a token, and plain decoding takes {alone['speed_up']:.2f} times its time, for {alone['texts']:,} photos of",
        f"test: the goal of {GOAL}x in time is {'reached' if alone['speed_up'] >= GOAL else 'missed'}. Of that the leaner",
        f"call of layers is a part: without it, it is {alone['speed_up_layers_called']:.2f}x. CIDEr is {plain:.3f} plain",
        f"and {given:.3f} without loss. {_same_captions(runs)}.",
    ]
    knows = (f"{share:.0%} after layer {layer}" for share, layer in zip(report["agreement"], exits, strict=True))
    second = [
        f"On {report['dev_photos']} photos of dev an exit's first word is the full depth's at {', '.join(knows)}. For every",
        "rule, the setting with the least time, as a trace of these photos and costs measured on this machine let expect:",
    ]
    third = [
        "Real runs on photos of test, from the encoder's states on. Calls of layers are counted by hooks, for each pass of",
        f"plain decoding ({layers} there; with eight photos a call for several counts once). Times are processor seconds",
        "of one thread, both ways in turns; in brackets the middle half of the photos or batches. The last column is of the",
        f"first {alone['hooked_photos']} photos or batches, with hooks on the layers, which are then called as transformers",
        "calls them.",
    ]
    costs = {name: f"{1000 * seconds:.2f} ms" for name, seconds in report["costs"].items()}
    fourth = [
        f"The calibration expected {alone['setting']['speed_up']:.2f}x of the first run, which brought",
        f"{alone['speed_up']:.2f}x. A layer took {costs['layer']}, every further token of the same pass {costs['more']},",
        f"the vocabulary of {report['vocabulary']:,} words {costs['words']}, a token of plain decoding {costs['plain']},",
        f"and what comes before a caption's first token {costs['prompt']}, in either way. Plain decoding takes",
        f"{1 / report['stock_over_plain']:.2f} times the time of the stock class without exits.",
    ]
    tries = (f"{speed_up:.2f}x with {most}" for most, speed_up in report["fixed_depth_tries"].items())
    fifth = [
        "With eight photos, rows that draft each at its own pace go apart: what is one call for eight rows in plain",
        f"decoding is several, {eight['speed_up']:.2f}x in time. Rows that all draft at one depth stay together,",
        f"{still['speed_up']:.2f}x; of the numbers of drafts that may wait, dev gave {', '.join(tries)}.",
    ]
    rules = [_rule(name, one["time"], exits) for name, one in report["rules"].items()]
    lines = [_run(RUNS[name], run, layers) for name, run in runs.items()]
    parts = [f"### Without loss: {title}", " ".join(first), " ".join(second), "\n".join([RULES_HEAD, *rules]),
             " ".join(third), "\n".join([RUNS_HEAD, *lines]), " ".join(fourth), " ".join(fifth)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _same_captions(runs: dict) -> str:
    apart = {RUNS[name]: run for name, run in runs.items() if run["equal"] < run["texts"]}
    if not apart:
        return "In every run all captions are the full depth's to the word"
    widest = max(gap for run in apart.values() for gap in run["gaps"])
    count = ", ".join(f"{run['texts'] - run['equal']} of {name}" for name, run in apart.items())
    return (
        f"Captions that differ: {count}; where they first do, the two words' logits are at most {widest:.1f} roundings apart"
    )


def _rule(name: str, one: dict, exit_layers: list[int]) -> str:
    at = [layer for layer, level in zip(exit_layers, one["thresholds"], strict=False) if level is not None]
    return (
        f"| {name} | {', '.join(map(str, at))} | {one['drafts']} | {one['drafted']:.2f} | {one['accepted']:.0%} | "
        f"{one['layer_calls']:.2f} | {one['speed_up']:.2f}x |"
    )


def _run(name: str, run: dict, layers: int) -> str:
    low, high = run["speed_up_middle_half"]
    return (
        f"| {name} | {run['rule']} | {run['texts']:,} | {run['equal']:,} | {run['layer_calls_per_step']:.2f} | "
        f"{layers / run['layer_calls_per_step']:.2f}x | {run['accepted']} of {run['drafted']} | "
        f"{run['speed_up']:.2f}x ({low:.2f} to {high:.2f}) | {run['speed_up_layers_called']:.2f}x |"
    )


def written(page: str, name: str) -> str:
    """The page with the figures of one result, from the committed file."""
    text, file = (lossless, "lossless-captions") if name == "lossless" else (figures, f"captioning-{name}")
    report = json.loads((ROOT / "benchmarks" / "results" / f"{file}.json").read_text())
    start, end = f"<!-- figures of {name}: benchmarks/captioning_page.py -->", f"<!-- end of figures of {name} -->"
    before, rest = page.split(start)
    return f"{before}{start}\n\n{text(report)}\n{end}{rest.split(end)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["whole", "frozen", "lossless"])
    args = parser.parse_args()
    for name in args.names:
        PAGE.write_text(written(PAGE.read_text(), name))


if __name__ == "__main__":
    main()
