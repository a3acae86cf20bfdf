"""Write a model as ONNX files: one file that stops at the exit, and a file for each layer.

    hf-earlyexit export onnx bert-with-exits bert-onnx
    hf-earlyexit export onnx bert-with-exits bert-int8 --int8 true --dataset reviews --split validation
    hf-earlyexit export onnx bert-with-exits bert-int8 --int8 true --dataset reviews --scale_split "train[:1000]"
    hf-earlyexit export onnx bert-with-exits models/bert --layout triton

int8 logits differ from those that the thresholds were chosen on, so it needs held-back rows to choose them anew on. With
rows of another split, it rounds by fixed scales, which is faster.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..errors import UsageError
from ..onnx import FORMS, LAYOUTS
from ..values import unexpected
from .arguments import SLICES, SPLITS, RowArguments
from .command_result import CommandResult

FORMATS = ("onnx",)


@dataclass
class ExportArguments(RowArguments):
    """Which model, where to, and how."""

    WORDS: ClassVar[tuple[str, ...]] = ("format", "model", "output")

    format: str = field(metadata={"help": ", ".join(FORMATS)})
    model: str = field(metadata={"help": "folder or Hub id of a model with exits"})
    output: str = field(metadata={"help": "folder to write"})
    forms: list[str] = field(default_factory=lambda: list(FORMS), metadata={"help": f"{', '.join(FORMS)}, or both"})
    layout: str = field(
        default=LAYOUTS[0],
        metadata={"help": f"{' or '.join(LAYOUTS)}: a model's folder in the repository of an inference server"},
    )
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to export as the default"})
    int8: bool = field(default=False, metadata={"help": "compute layers in 8 bits; thresholds are chosen anew"})
    dataset: str | None = field(default=None, metadata={"help": f"with int8: held-back rows with labels: {SPLITS}"})
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; validation by default"})
    scale_split: str | None = field(
        default=None,
        metadata={"help": f"with int8: another split of the data set, {SLICES}, whose rows fix the scales"},
    )
    target: str | None = field(default=None, metadata={"help": "for the new thresholds; as the model was calibrated"})


ARGUMENTS = (ExportArguments,)


def run(args: ExportArguments) -> CommandResult:
    """Load, export, tell what changed."""
    from ..onnx.export import export_onnx
    from ..serving.reader import reads_images
    from .loading import load_model, load_parts_there, reading_parts

    if args.format not in FORMATS:
        raise unexpected("format", args.format, ", ".join(FORMATS))
    model = load_model(args.model)
    model.family.require_traceable()
    if args.operating_point is not None:
        points = model.config
        model.set_exit_policy(model.policy_at(args.operating_point))
        points.exit_certificate = (points.exit_point_certificates or {}).get(args.operating_point)
    images = reads_images(model)
    if args.dataset is not None:
        parts = reading_parts(args.model, model)
    else:
        there = load_parts_there(Path(args.model))
        parts = {name: there[name] for name in ("image_processor" if images else "tokenizer",)}
    rows = scale_rows = None
    if args.dataset is None and args.scale_split is not None:
        raise UsageError("scale_split names a split of no data set: pass --dataset.", field="scale_split")
    if args.dataset is not None:
        from ..data.labelling import Labelling
        from .rows import read_rows, rows_and_labelling

        rows = read_rows(args, args.dataset, args.split, "validation", images)
        rows, _ = rows_and_labelling(args, rows, Labelling.of_model(model.config))
        if args.scale_split is not None:
            scale_rows = read_rows(args, args.dataset, args.scale_split, "train", images)
    changed = export_onnx(
        model,
        args.output,
        forms=args.forms,
        layout=args.layout,
        int8=args.int8,
        rows=rows,
        scale_rows=scale_rows,
        **parts,
        target=args.target,
        split=args.split or "validation",
        progress=True,
    )
    lines = [] if changed is None else [str(changed)]
    written = args.forms if args.layout == LAYOUTS[0] else [args.layout]
    numbers = "" if not args.int8 else ", int8" if scale_rows is None else ", int8 by fixed scales"
    lines.append(f"written to {args.output}: {', '.join(written)}{numbers}")
    values = {"output": args.output, "forms": args.forms, "layout": args.layout, "int8": args.int8}
    values["static"] = scale_rows is not None
    return CommandResult(values if changed is None else {**values, "changed": changed.to_dict()}, "\n".join(lines))
