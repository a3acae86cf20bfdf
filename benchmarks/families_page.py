"""Write the tables of docs/families.md: `python -m benchmarks.families_page`.

What was measured comes from benchmarks.families_laws and benchmarks.families_speed; `--measure` runs both before.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from hf_earlyexit.doors import door_of
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import LAST, TEXT, WRITING, Family

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
SPEED = Path(__file__).parent / "results" / "families.json"  # of families_speed.py
LAWS = Path(__file__).parent / "results" / "families_laws.json"  # of families_laws.py
SERVED = ("served", "int8", "onnx_layers", "onnx_one_file")
SAME_CODE = {"xlm-roberta": "roberta", "camembert": "roberta"}
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
LAWS_BEGIN, LAWS_END = "<!-- laws: begin -->", "<!-- laws: end -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: begin -->", "<!-- speed: end -->"


def rows_in(family: Family) -> str:
    """How rows stand in a batch."""
    return "end to end" if family.packed is not None else "padded" if family.task == TEXT else "of one size"


def table() -> str:
    lines = [
        "| model type | model class | rows | answers from | `exit_head=linear` | int8 | ONNX | writes text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stock_type, family in FAMILIES.items():
        token = "last real token" if family.token == LAST else "first token" if family.one_token is True else "see config"
        token = "patches" if family.one_token is False and family.token != LAST else token
        rows = rows_in(family)
        pool, graph = "yes" if family.pool is not None else "no pooler", "no" if family.untraced else "yes"
        writer = f"`{door_of(stock_type, WRITING).model}`" if family.writer else "no"
        cells = (f"`{stock_type}`", f"`{door_of(stock_type).model}`", rows, token, pool, "yes", graph, writer)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def laws() -> str:
    """What families_laws.py measured."""
    found: dict[str, Any] = json.loads(LAWS.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        "Tiny models with random weights. *Differences* are the largest of logits, 0 being the same to the bit: of the full "
        "model against the stock model with the same weights, padded on the right, on the left and not at all; of the stock "
        "class reading our folder; of the states of rows whose company left after the first layer; of rows packed end to "
        "end against padded ones. *Rows served as calibrated* leave at the very layer, with the very label, that the trace "
        f"counts on, by one rule (`confidence`), no score being within {found['near']:g} of its threshold; {versions}. "
        "Where rows are padded, the last bit of a sum depends on how far, and rounding to 8 bits can make a step of it.",
        "",
        "| model type | full model | folder | company left | packed | `predict` | int8 | ONNX layers | ONNX one file |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, told in found["families"].items():
        differences = [told[key] for key in ("stock_answer", "stock_reads_folder", "rows_dropped", "packed")]
        cells = [rows_in(FAMILIES[name]) if one is None else f"{one:.1g}" for one in differences]
        counts = [(told[key], told["int8_rows" if key == "int8" else "rows"]) for key in SERVED]
        cells += ["no" if one is None else f"{one:,} of {rows:,}" for one, rows in counts]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed() -> str:
    """What families_speed.py measured."""
    found: dict[str, Any] = json.loads(SPEED.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"Shape of a base model (12 layers of width 768, random weights, float32), {found['rows']} rows of mixed lengths "
        f"({found['pictures']} pictures of 224 x 224) that leave after about 6 layers in the mean, one thread of a "
        f"processor that was not idle, CPU time, {found['turns']} turns; {versions}. The *bound* is the speed-up if time "
        "were tokens times layers, the *share* what early exit reaches of it over every layer in our own batches; median "
        "and the middle half. The stock class runs batches of 32 in arrival order.",
        "",
        "| model type | rows | bound | share of the bound | over the stock class |",
        "|---|---|---|---|---|",
    ]
    for name, told in found["families"].items():
        rows = rows_in(FAMILIES[name])
        (low, share, high), (least, over, most) = told["share"], told["over_stock"]
        lines.append(
            f"| `{name}` | {rows} | {told['bound']:.2f}x | {share:.2f} ({low:.2f}-{high:.2f}) | {over:.1f}x "
            f"({least:.1f}-{most:.1f}) |"
        )
    alike = ", ".join(f"`{name}`" for name in SAME_CODE)
    return "\n".join([*lines, "", f"{alike} run the very code of `roberta`."])


def page(text: str) -> str:
    for begin, end, made in ((BEGIN, END, table), (LAWS_BEGIN, LAWS_END, laws), (SPEED_BEGIN, SPEED_END, speed)):
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n{made()}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    if "--measure" in sys.argv:
        for measuring in ("families_laws", "families_speed"):
            subprocess.run([sys.executable, "-m", f"benchmarks.{measuring}"], check=True)
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
