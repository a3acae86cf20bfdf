"""Measure what early exit brings in time for a model and its rows, beside the full model and one that is simply cut off."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from .arguments import DeviceArguments, FileArguments
from .command_result import CommandResult


@dataclass
class BenchArguments(FileArguments, DeviceArguments):
    """Which model on which texts or pictures."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    input: str = field(metadata={"help": "text file with one text, or name of a picture, a line, or a data set"})
    split: str | None = field(default=None, metadata={"help": "split of the data set; test by default"})
    rows: int = field(default=500, metadata={"help": "rows to measure with, drawn from the file"})
    batch_size: int = field(default=32, metadata={"help": "rows of a batch in arrival order"})
    static_layer: int | None = field(default=None, metadata={"help": "where the static model stops; the mean exit layer"})
    forms: list[str] | None = field(
        default=None,
        metadata={
            "help": "number formats and engines: some of fp32, bf16, fp16, int8, onnx, onnx-int8, onnx-int8-static; all "
            "that run here"
        },
    )
    repeats: int = field(default=3, metadata={"help": "turns after one to warm up"})
    latency_rows: int = field(default=50, metadata={"help": "rows that are run one by one"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    seed: int = field(default=0, metadata={"help": "of the rows and the turns"})


ARGUMENTS = (BenchArguments,)


def run(args: BenchArguments) -> CommandResult:
    """Read, measure, tell."""
    from ..measuring.bench import as_table, bench
    from ..measuring.forms import make_forms
    from ..serving.reader import reader_for, reads_images
    from .incoming import incoming
    from .loading import load_model, reading_parts

    model = load_model(args.model, args.device)
    source = incoming(args, args.input, args.split, reads_images(model))
    texts = [source.text(row) for row in source.rows]
    chosen = random.Random(args.seed).sample(texts, min(args.rows, len(texts)))
    rows = reader_for(model, **reading_parts(args.model, model)).encode_all(chosen)[:]
    forms = make_forms(model, rows, args.forms)
    result = bench(
        forms.models,
        rows,
        batch_size=args.batch_size,
        static_layer=args.static_layer,
        repeats=args.repeats,
        latency_rows=args.latency_rows,
        seed=args.seed,
    )
    result["left_out"] = forms.left_out
    lines = [f"{len(chosen)} rows, {args.repeats} turns; speed-ups are over the first line.", "", as_table(result), ""]
    for name, exits in result["exits"].items():
        lines.append(
            f"{name}: mean exit layer {exits['mean_layer']:.2f}, layer speed-up {exits['layer_speed_up']:.2f}x, "
            f"token-layer bound {exits['token_layer_bound']:.2f}x, of which {100 * exits['share_of_bound']:.0f} % reached"
        )
    lines += [f"Rows of {name} are padded, which costs time: {why}." for name, why in result["padded"].items()]
    lines += [f"Left out: {name}, as {reason}." for name, reason in forms.left_out.items()]
    lines += ["", result["advice"]]
    if args.output is not None:
        Path(args.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return CommandResult(result, "\n".join(lines))
