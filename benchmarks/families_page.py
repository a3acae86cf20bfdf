"""Write the table of docs/families.md: `python -m benchmarks.families_page`."""

from pathlib import Path

from hf_earlyexit.doors import door_of
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import LAST, WRITING

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"


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


def page(text: str) -> str:
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
