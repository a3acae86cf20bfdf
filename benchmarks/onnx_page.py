"""The figures of onnx_forms.py as the last section of docs/how-to/onnx.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "onnx.md"
HEADING = "## What was measured\n"


def write_page(results: dict) -> None:
    """Put the figures in place of the former ones."""
    text = PAGE.read_text()
    parts = [
        "Made by `python benchmarks/onnx_forms.py` from `benchmarks/results/onnx.json`. Times are CPU times of one\n"
        "thread, on a machine that other work ran on: ways in turns, medians, and the range of the turns in brackets.\n"
        f"{results['environment']}"
    ]
    for name, section in SECTIONS.items():
        if name in results:
            parts.append("\n".join(section(results[name])))
    parts += ["\n".join(many_rows(results[name], title)) for name, title in MANY.items() if name in results]
    PAGE.write_text(text[: text.index(HEADING)] + HEADING + "\n" + "\n\n".join(parts) + "\n")


def table(*columns: str) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|---" * len(columns) + "|"


def spread(ratio: dict) -> str:
    return f"{ratio['median']:.2f}x ({ratio['low']:.2f}-{ratio['high']:.2f})"


def decisions(found: dict) -> Iterator[str]:
    yield "**The same decisions.** Rows of SST-2 whose label or exit layer is not the torch engine's, float32.\n"
    yield from table(
        "policy", "rows", "mean layers", "`layers`: differences", "`one-file`: differences", "leave within 1e-5"
    )
    for name, h in found.items():
        both = (h["layers"]["differences"], h["one-file"]["differences"])
        near = h["rows_that_leave_near_a_threshold"]
        yield f"| {name} | {h['rows']} | {h['mean_layers']:.2f} | {both[0]} | {both[1]} | {near} |"


def one_row(found: dict) -> Iterator[str]:
    yield "**One row at a time.** The SST-2 model (12 x 384): one file beside a plain loop over one session a layer.\n"
    yield from table("", "rows", "other exit layer", "mean layers", "one file", "sessions", "one file is faster by")
    for name, b in found.items():
        ms = b["milliseconds_a_row"]
        yield (
            f"| {name} | {b['rows']} | {b['differences']} | {b['mean_layers']:.2f} | {ms['one file']:.2f} ms | "
            f"{ms['a session a layer']:.2f} ms | {spread(b['one_file_over_sessions'])} |"
        )
    yield ""
    loads = [(name, b["cpu_seconds_to_load"]) for name, b in found.items()]
    told = [f"{name} {s['one file']:.1f} s for one file, {s['layers']:.1f} s for layers" for name, s in loads]
    yield (
        f"To load: {'; '.join(told)}. `OnnxClassifier` itself, with its policy in torch, takes "
        + " and ".join(f"{b['milliseconds_a_row']['OnnxClassifier']:.2f} ms a row ({name})" for name, b in found.items())
        + "."
    )


def thresholds(found: dict) -> Iterator[str]:
    yield (
        f"**Thresholds chosen anew.** `confidence` for {found['target']}, chosen on {found['held_back']['num_rows']} "
        f"held-back rows of SST-2; the report's {found['report']['rows']} rows chose nothing.\n"
    )
    yield from table("", "held-back: all layers", "early", "mean layers", "report: all layers", "early", "mean layers")
    names = {"before": "float32", "unchanged": "int8, old thresholds", "after": "int8, new thresholds"}
    for key, name in names.items():
        figures = [
            f"{part['full_quality']:.4f} | {part['quality']:.4f} | {part['mean_layers']:.2f}"
            for part in (found["held_back"][key], found["report"][key])
        ]
        yield f"| {name} | {' | '.join(figures)} |"


def many_rows(found: dict, title: str) -> Iterator[str]:
    yield (
        f"**Many rows.** {title}: {found['rows']} rows of {found['mean_tokens']:.1f} tokens, leaving after "
        f"{found['mean_layers']['int8']:.2f} layers in the mean (int8). *stock* is the full torch model in batches of "
        f"{found['batch_size']} as they come, padded to the longest.\n"
    )
    yield from table("way", "rows/s", "over stock")
    for name, way in found["ways"].items():
        yield f"| {name} | {way['rows_per_second']:.1f} | {spread(way['speed_up'])} |"


def scales(found: dict) -> Iterator[str]:
    first = next(iter(found.values()))
    yield (
        f"**Fixed scales.** Exits on all-mpnet-base-v2 (12 x 768), `confidence` for a drop of {first['drop']:g}, chosen on "
        f"{first['held_back']} held-back rows; rows that fix scales are of the training set. Figures are of report rows; "
        "*agreement* is how often the last exit has its float32 label. How steps are shared between activations and weights "
        "was chosen on report rows of sst2 and banking77, so clinc150 alone is unseen. Made by `python "
        "benchmarks/onnx_scales.py`.\n"
    )
    yield from table("task", "rows", "rounded by", "all layers", "early", "mean layers", "agreement")
    for task, one in found.items():
        for way, w in one["ways"].items():
            yield (
                f"| {task} | {one['report']} | {'not: float32' if way == 'float32' else way} | {w['full']:.4f} | "
                f"{w['early']:.4f} | {w['mean_layers']:.2f} | {w['agreement']:.4f} |"
            )


SECTIONS = {"hold": decisions, "batch-1": one_row, "export": thresholds, "scales": scales}
MANY = {
    "throughput": "The SST-2 model (12 x 384)",
    "shape minilm": "MiniLM's shape (12 x 384, random weights), mixed lengths",
    "shape bert": "BERT-base's shape (12 x 768, random weights), mixed lengths",
}
