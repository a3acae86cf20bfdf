"""Measure what early exit brings in time for a model and its texts, beside the full model and one that is simply cut off."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .answer import Answer
from .arguments import DeviceArguments, FileArguments


@dataclass
class BenchArguments(FileArguments, DeviceArguments):
    """Which model on which texts."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    input: str = field(metadata={"help": "text file with one text a line, or a data set"})
    split: str | None = field(default=None, metadata={"help": "split of the data set; test by default"})
    rows: int = field(default=500, metadata={"help": "rows to measure with, drawn from the file"})
    batch_size: int = field(default=32, metadata={"help": "rows of a batch in arrival order"})
    static_layer: int | None = field(default=None, metadata={"help": "where the static model stops; the mean exit layer"})
    dtype: str = field(default="float32", metadata={"help": "of the model: float32, bfloat16 or float16"})
    int8: bool = field(default=False, metadata={"help": "measure an int8 copy too, with the same thresholds; on a CPU"})
    repeats: int = field(default=3, metadata={"help": "turns after one to warm up"})
    latency_rows: int = field(default=50, metadata={"help": "rows that are run one by one"})
    output: str | None = field(default=None, metadata={"help": "JSON file to write"})
    seed: int = field(default=0, metadata={"help": "of the rows and the turns"})


ARGUMENTS = (BenchArguments,)
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def run(args: BenchArguments) -> Answer:
    """Read, measure, tell."""
    from transformers import AutoTokenizer

    from ..measuring.bench import as_table, bench
    from ..serving.int8 import quantize_int8
    from ..serving.rows import encode_rows
    from .incoming import incoming

    model = _as_asked(args)
    source = incoming(args, args.input, args.split)
    texts = [source.text(row) for row in source.rows]
    chosen = random.Random(args.seed).sample(texts, min(args.rows, len(texts)))
    models = {SHORT[args.dtype]: model}
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


def _as_asked(args: BenchArguments) -> Any:
    """The model on the device and in the dtype asked for."""
    import torch

    from .loading import load_model, on_device

    if args.dtype not in SHORT:
        raise UsageError(f"dtype is {args.dtype!r}; expected {', '.join(SHORT)}.", field="dtype", value=args.dtype)
    return on_device(load_model(args.model), args.device, getattr(torch, args.dtype))
