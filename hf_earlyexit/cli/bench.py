"""Measure what early exit brings in time for a model and its texts, beside the full model and one that is simply cut off."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoTokenizer

from ..inference.bench import as_table, bench
from ..inference.quantize import quantize_int8
from ..inference.rows import encode_rows
from .answer import Answer
from .loading import load_model


@dataclass
class BenchArguments:
    """Which model on which texts."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    input: str = field(metadata={"help": "text file with one text a line"})
    rows: int = field(default=500, metadata={"help": "rows to measure with, drawn from the file"})
    batch_size: int = field(default=32, metadata={"help": "rows of a batch in arrival order"})
    static_layer: int | None = field(default=None, metadata={"help": "where the static model stops; the mean exit layer"})
    int8: bool = field(default=False, metadata={"help": "measure an int8 copy too, with the same thresholds"})
    repeats: int = field(default=3, metadata={"help": "turns after one to warm up"})
    latency_rows: int = field(default=50, metadata={"help": "rows that are run one by one"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    seed: int = field(default=0, metadata={"help": "of the rows and the turns"})


ARGUMENTS = (BenchArguments,)


def run(args: BenchArguments) -> Answer:
    """Read, measure, tell."""
    model = load_model(args.model).eval()
    texts = Path(args.input).read_text(encoding="utf-8").splitlines()
    chosen = random.Random(args.seed).sample(texts, min(args.rows, len(texts)))
    models = {"fp32": model}
    if args.int8:
        models["int8"] = quantize_int8(model)
        models["int8"].set_exit_policy(model.exit_policy)  # for its speed alone; to serve it, calibrate it
    result = bench(
        models,
        encode_rows(chosen, AutoTokenizer.from_pretrained(args.model)),
        batch_size=args.batch_size,
        static_layer=args.static_layer,
        repeats=args.repeats,
        latency_rows=args.latency_rows,
        seed=args.seed,
    )
    lines = [as_table(result)]
    for name, exits in result["exits"].items():
        lines.append(
            f"\n{name}: mean exit layer {exits['mean_layer']:.2f}, layer speed-up {exits['layer_speed_up']:.2f}x, "
            f"token-layer bound {exits['token_layer_bound']:.2f}x, of which {100 * exits['share_of_bound']:.0f} % reached"
        )
        lines.append(result["advice"][name])
    if args.output is not None:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return Answer(result, "\n".join(lines))
