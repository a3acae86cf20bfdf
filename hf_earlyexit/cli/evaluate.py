"""Say what early exit does to a labelled data set: quality and layers, and on request time.

    hf-earlyexit evaluate --model bert-with-exits --dataset reviews --split test
    hf-earlyexit evaluate --model bert-with-exits --dataset reviews --time true --json true

Layers are those that were really run. The measured speed-up compares early exit with the full model, in turns on this
machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoTokenizer

from ..errors import UsageError
from ..measuring.timing import compare_speed
from ..modeling.configuration import EXACT
from ..problem_types import quality_name, row_quality
from ..serving.predict import predict
from ..serving.rows import encode_rows
from ..training.data import load_splits, require_split
from .answer import Answer
from .loading import load_model


@dataclass
class EvaluateArguments:
    """Which model on which rows."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    dataset: str = field(metadata={"help": "folder with one file per split, a file, or a Hub id"})
    split: str = field(default="test", metadata={"help": "split of the data set; neither trained nor calibrated on"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to use"})
    time: bool = field(default=False, metadata={"help": "measure the time of both, in turns"})
    repeats: int = field(default=5, metadata={"help": "rounds of measuring"})
    max_batch_tokens: int = field(default=2048, metadata={"help": "padded tokens in a batch"})


ARGUMENTS = (EvaluateArguments,)


def run(args: EvaluateArguments) -> Answer:
    """Predict early and in full, compare."""
    if args.repeats < 1:
        raise UsageError(f"repeats is {args.repeats}; expected at least 1.", field="repeats", value=args.repeats)
    model = load_model(args.model)
    if args.operating_point == EXACT:
        raise UsageError(
            f"At {EXACT!r} every row runs through all layers; there is nothing to compare.", field="operating_point"
        )
    if model.policy_at(args.operating_point) is None:
        raise UsageError(f"{args.model} has no exit policy; run `hf-earlyexit calibrate` first.", field="model")
    rows = require_split(load_splits(args.dataset), args.split, args.dataset)
    if not len(rows) or "label" not in rows.column_names:
        raise UsageError(
            f"Split {args.split!r} has {len(rows)} rows and columns {', '.join(rows.column_names)}; expected at least one "
            "row and a column 'label'.",
            field="split",
        )
    encoded = encode_rows(rows, AutoTokenizer.from_pretrained(args.model))  # once, so that measuring does not tokenize
    found = figures(model, encoded, torch.as_tensor(rows["label"]), args)
    return Answer(found, _sentences(found))


def figures(model: Any, rows: Any, labels: torch.Tensor, args: EvaluateArguments) -> dict[str, Any]:
    """What early exit does to the rows, as plain numbers."""

    def answer(early_exit: bool) -> Any:
        point = args.operating_point if early_exit else EXACT
        return predict(model, rows, max_batch_tokens=args.max_batch_tokens, operating_point=point)

    problem, depth = model.config.resolved_problem_type, model.exit_layers[-1]
    early = answer(True)
    quality = row_quality(early.logits, labels, problem)
    full = row_quality(answer(False).logits, labels, problem)
    layers = early.exit_layer.double()
    found = {
        "policy": model.policy_at(args.operating_point).name,
        "measure": quality_name(problem),
        "rows": len(labels),
        "quality": float(quality.mean()),
        "full_quality": float(full.mean()),
        "standard_error": float((quality - full).std(correction=0) / len(labels) ** 0.5),
        "mean_layers": float(layers.mean()),
        "num_layers": depth,
        "layer_speed_up": float(depth / layers.mean()),
        "exit_shares": {str(layer): float((layers == layer).double().mean()) for layer in model.exit_layers},
    }
    if args.time:
        runs = {"full": lambda: answer(False), "early": lambda: answer(True)}
        timings = compare_speed(runs, "full", args.repeats)
        found["time"] = {
            "seconds": timings["early"].seconds,
            "full_seconds": timings["full"].seconds,
            "speed_up": timings["early"].speed_up,
            "middle_half": [timings["early"].low, timings["early"].high],
            "device": model.device.type,
            "threads": torch.get_num_threads(),
        }
    return found


def _sentences(found: dict[str, Any]) -> str:
    lines = [
        f"{found['policy']} on {found['rows']} rows",
        f"{found['measure']} {found['quality']:.4f} against {found['full_quality']:.4f} of the full model "
        f"({found['quality'] - found['full_quality']:+.4f}, standard error {found['standard_error']:.4f})",
        f"mean layers {found['mean_layers']:.2f} of {found['num_layers']}: layer speed-up {found['layer_speed_up']:.2f}x",
        "leaving after layer " + ", ".join(f"{layer}: {share:.1%}" for layer, share in found["exit_shares"].items()),
    ]
    if "time" in found:
        time = found["time"]
        low, high = time["middle_half"]
        lines.append(
            f"measured speed-up {time['speed_up']:.2f}x (middle half {low:.2f} to {high:.2f}): {time['seconds']:.3f} s "
            f"against {time['full_seconds']:.3f} s, {time['device']}, {time['threads']} threads"
        )
    return "\n".join(lines)
