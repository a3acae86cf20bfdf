"""Compare all policies on held-back rows in one HTML file, with the exits' honesty and the rows that left early and wrong.

    hf-earlyexit report --model bert-with-exits --dataset reviews --split validation --output report.html

Numbers and thresholds come from one half of the rows, figures from the other. A trace saved before spares the pass through
the model: --trace bert-with-exits/held-back.safetensors
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from .arguments import SLICES, SPLITS, DeviceArguments, RowArguments
from .command_result import CommandResult

if TYPE_CHECKING:
    from ..calibration.replay import Replay
    from ..modeling.protocol import ExitModel
    from ..trace import ExitTrace


@dataclass
class ReportArguments(RowArguments, DeviceArguments):
    """Which model on which rows."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits"})
    dataset: str | None = field(default=None, metadata={"help": SPLITS})
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; validation by default"})
    trace: str | None = field(default=None, metadata={"help": "trace of the same rows, instead of a pass through the model"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy shown as the one in service"})
    output: str = field(default="report.html", metadata={"help": "file to write"})
    max_drop: float = field(default=0.01, metadata={"help": "quality that may be lost on the rows that choose"})
    seed: int = field(default=0, metadata={"help": "of the split in halves"})


ARGUMENTS = (ReportArguments,)


def run(args: ReportArguments) -> CommandResult:
    """Collect or load a trace, write the report."""
    from ..modeling.configuration import EXACT
    from ..reports.write import write_report
    from ..serving.collect import collect_trace
    from ..serving.reader import reads_images
    from .loading import load_model, reading_parts

    if args.dataset is None and args.trace is None:
        raise UsageError("No rows: name them with --dataset and --split, or give a --trace.", field="dataset")
    if args.operating_point == EXACT:
        raise UsageError(f"At {EXACT!r} every row runs through all layers; name another.", field="operating_point")
    model = load_model(args.model, args.device)
    policy = model.policy_at(args.operating_point)
    rows, texts, pictures, split = None, None, None, args.split or "validation"
    if args.dataset is not None:
        from ..data.labelling import Labelling
        from .pictures import named_pictures
        from .rows import read_rows, rows_and_labelling, texts_of

        images = reads_images(model)
        rows = read_rows(args, args.dataset, args.split, "validation", images)
        rows, _ = rows_and_labelling(args, rows, Labelling.of_model(model.config))
        texts, pictures = (None, named_pictures(rows)) if images else (texts_of(rows), None)
    if args.trace is None:
        trace = collect_trace(model, rows, **reading_parts(args.model, model), split=split)
    else:
        trace = _load_trace(args.trace, model)
    names = model.config.id2label
    comparison = write_report(
        trace,
        args.output,
        policy=policy,
        label_names=[str(names[index]) for index in range(len(names))],
        texts=texts,
        pictures=pictures,
        title=Path(args.model).name,
        rows_name=None if args.dataset is None else f"{Path(args.dataset).name}, {split}",
        max_drop=args.max_drop,
        seed=args.seed,
    )
    best = comparison.best
    values = {
        "output": args.output,
        "rows": comparison.judging.num_rows,
        "rows_that_chose": comparison.num_choosing,
        "best": best.name,
        "policies": {name: _figures(one.judged) for name, one in comparison.contenders.items()},
        "left_out": comparison.left_out,
    }
    return CommandResult(
        values,
        f"saved {args.output}: {len(comparison.contenders)} policies on {comparison.judging.num_rows} rows; fewest layers "
        f"on the rows that chose: {best.name}, layer speed-up {best.judged.layer_speed_up:.2f}x",
    )


def _figures(judged: Replay) -> dict[str, float]:
    names = ("quality", "full_quality", "standard_error", "mean_layers", "layer_speed_up")
    return {name: getattr(judged, name) for name in names}


def _load_trace(path: str, model: ExitModel) -> ExitTrace:
    from ..modeling.fingerprint import model_fingerprint
    from ..trace import ExitTrace

    trace, fingerprint = ExitTrace.load(path), model_fingerprint(model)
    if trace.fingerprint not in ("", fingerprint):
        raise UsageError(
            f"{path} was collected on a model of fingerprint {trace.fingerprint}; this one has {fingerprint}. "
            "Leave --trace out to collect a new one.",
            field="trace",
            path=path,
        )
    return trace
