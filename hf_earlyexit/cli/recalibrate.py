"""Choose thresholds anew on rows of today, beside the old ones; exits and heads stay as they are.

    hf-earlyexit recalibrate --model bert-with-exits --dataset fresh.jsonl --operating_point june
    hf-earlyexit recalibrate --model bert-with-exits --dataset traffic.jsonl --operating_point june --unlabelled true

The table compares the old thresholds with the new ones on the same rows. The new ones become an operating point; the old
ones stay what they are, and nothing is overwritten.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import SLICES, SPLITS, CertifiedArguments, DeviceArguments, RowArguments
from .calibrate import METRIC_WORDS, TARGET_WORDS
from .command_result import CommandResult

if TYPE_CHECKING:
    from ..calibration import Replay
    from ..modeling.protocol import ExitModel
    from ..policies import ExitPolicy


@dataclass
class RecalibrateArguments(RowArguments, CertifiedArguments, DeviceArguments):
    """Which thresholds, on which rows."""

    model: str = field(metadata={"help": "folder of a model with exits and a policy"})
    dataset: str = field(metadata={"help": f"rows of today: a {SPLITS}"})
    operating_point: str = field(metadata={"help": "a new name for the new thresholds"})
    former: str | None = field(default=None, metadata={"help": "operating point to start from; the default policy"})
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; validation by default"})
    target: str | None = field(default=None, metadata={"help": f"{TARGET_WORDS}; by default what the old ones were for"})
    metric: str | None = field(default=None, metadata={"help": METRIC_WORDS})
    unlabelled: bool = field(default=False, metadata={"help": "choose for agreement with the full model; read no labels"})
    seed: int = field(default=0, metadata={"help": "of the rows a policy learns its own numbers from"})


ARGUMENTS = (RecalibrateArguments,)


def run(args: RecalibrateArguments) -> CommandResult:
    """Calibrate, compare, save."""
    from ..calibration import calibrate, replay
    from ..hub.save import save_calibrated
    from .loading import load_model, reading_parts
    from .rows import collected

    folder = Path(args.model)
    if not folder.is_dir():
        raise UsageError(f"{args.model} is no folder; recalibrate writes into one. Download the model first.", path=folder)
    model = load_model(folder, args.device)
    former = model.policy_at(args.former)
    if former is None:
        raise UsageError(f"{args.model} has no such policy; run `hf-earlyexit calibrate` first.", field="former")
    if args.operating_point in model.operating_points:
        raise UsageError(
            f"There is an operating point {args.operating_point!r} already; name a new one.",
            field="operating_point",
            value=args.operating_point,
        )
    target = args.target or _former_target(model, args.former)
    trace, certified = collected(args, model, reading_parts(folder, model), labelled=not args.unlabelled)
    policy: Any = former.name if former.learns else former
    result = calibrate(trace, policy, target, metric=args.metric, seed=args.seed, **certified)
    old, new = (replay(one, trace, result.metric) for one in (former, result.policy))
    model.set_operating_points({args.operating_point: result}, keep_others=True)
    save_calibrated(model, folder, result, args.operating_point)
    rows = {"old": _figures(old, former), "new": _figures(new, result.policy)}
    values = {"model": str(folder), "operating_point": args.operating_point, **rows, "result": result.to_dict()}
    return CommandResult(values, f"{_table(rows, result.metric, trace.num_rows)}\n\n{result}")


def _figures(outcome: Replay, policy: ExitPolicy) -> dict[str, Any]:
    names = ("quality", "full_quality", "standard_error", "mean_layers")
    return {**{name: getattr(outcome, name) for name in names}, "thresholds": list(policy.thresholds)}


def _former_target(model: ExitModel, point: str | None) -> str:
    points = model.config.exit_point_certificates or {}
    certificate = model.config.exit_certificate if point is None else points.get(point)
    if certificate is None:
        raise UsageError("Nothing tells what the old thresholds were chosen for: pass --target.", field="target")
    return str(certificate["target"])


def _table(rows: dict[str, Any], metric: str, count: int) -> str:
    lines = [f"on the same {count} rows, in {metric}", "      quality  difference  standard error  mean layers  thresholds"]
    for name, row in rows.items():
        thresholds = " ".join("-" if value is None else f"{value:.4f}" for value in row["thresholds"])
        lines.append(
            f"{name:5s} {row['quality']:7.4f} {row['quality'] - row['full_quality']:+11.4f} {row['standard_error']:15.4f} "
            f"{row['mean_layers']:12.2f}  {thresholds}"
        )
    return "\n".join(lines)
