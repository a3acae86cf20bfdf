"""Write the table of docs/families.md: `python -m benchmarks.families_page`."""

import json
from pathlib import Path
from typing import Any

from hf_earlyexit.doors import door_of
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import LAST, WRITING

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
SPEED = Path(__file__).parent / "results" / "families.json"  # of families_speed.py
SAME_CODE = {"xlm-roberta": "roberta", "camembert": "roberta"}
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"
SPEED_BEGIN, SPEED_END = "<!-- speed: begin -->", "<!-- speed: end -->"


def table() -> str:
    lines = [
        "| model type | model class | rows | answers from | `exit_head=linear` | int8 | ONNX | writes text |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stock_type, family in FAMILIES.items():
        token = "last real token" if family.token == LAST else "first token" if family.one_token is True else "see config"
        token = "patches" if family.one_token is False and family.token != LAST else token
        rows = "end to end" if family.packed is not None else "padded" if family.task.startswith("text") else "of one size"
        pool, graph = "yes" if family.pool is not None else "no pooler", "no" if family.untraced else "yes"
        writer = f"`{door_of(stock_type, WRITING).model}`" if family.writer else "no"
        cells = (f"`{stock_type}`", f"`{door_of(stock_type).model}`", rows, token, pool, "yes", graph, writer)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def speed() -> str:
    """What families_speed.py measured."""
    found: dict[str, Any] = json.loads(SPEED.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    lines = [
        f"Shape of a base model (12 layers of width 768, random weights, float32), {found['rows']} rows of mixed lengths "
        "that leave after about 6 layers in the mean, one thread of a processor that was not idle, CPU time, "
        f"{found['turns']} turns; {versions}. The *bound* is the speed-up if time were tokens times layers, the *share* "
        "what early exit reaches of it over every layer in our own batches; median and the middle half. The stock class "
        "runs batches of 32 in arrival order.",
        "",
        "| model type | rows | bound | share of the bound | over the stock class |",
        "|---|---|---|---|---|",
    ]
    for name, told in found["families"].items():
        rows = "end to end" if FAMILIES[name].packed is not None else "padded"
        (low, share, high), (least, over, most) = told["share"], told["over_stock"]
        lines.append(
            f"| `{name}` | {rows} | {told['bound']:.2f}x | {share:.2f} ({low:.2f}-{high:.2f}) | {over:.1f}x "
            f"({least:.1f}-{most:.1f}) |"
        )
    alike = ", ".join(f"`{name}`" for name in SAME_CODE)
    return "\n".join([*lines, "", f"{alike} run the very code of `roberta`."])


def page(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    text = f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"
    head, _, rest = text.partition(SPEED_BEGIN)
    return f"{head}{SPEED_BEGIN}\n{speed()}\n{SPEED_END}{rest.partition(SPEED_END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
