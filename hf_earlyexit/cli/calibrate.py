"""Choose thresholds for a trained model on held-back rows, and put policy and thresholds into its config.

    hf-earlyexit calibrate --model bert-with-exits --policy confidence --target max-drop:0.01
    hf-earlyexit calibrate --model bert-with-exits --target speed-up:2 --operating_point fast
    hf-earlyexit calibrate --model bert-with-exits --dataset data --form int8
    hf-earlyexit calibrate --model bert-with-exits --target max-drop:0.01 --every auto --performance_hint latency
    hf-earlyexit calibrate --model llama-with-exits --dataset prompts.txt --target max-drop:0.05
    hf-earlyexit calibrate --model llama-with-exits --dataset prompts.txt --lossless true
    hf-earlyexit calibrate --model captioner --dataset photos --lossless true

Thresholds and policy then stand in the model's config.json, and how they were chosen in calibration.json. A policy with a
name is used where that is asked for; it becomes the default only if there is none. Captioners and language models write:
their thresholds are chosen by texts that they really write.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .arguments import SLICES, SPLITS, TRACE_FILE, CertifiedArguments, DeviceArguments, RowArguments, TextArguments
from .command_result import CommandResult

if TYPE_CHECKING:
    from ..calibration.result import CalibrationResult
    from ..modeling.protocol import TorchExitClassifier, TorchExitModel

POLICY_WORDS = (
    "beem, beem-a, beem-c, beem-calibrated, confidence, entropy, gate, margin, patience, reward, saturation or static"
)
TARGET_WORDS = (
    "certified:DROP@CONFIDENCE, final-layer-error, layer-budget:LAYERS, max-drop:DROP or speed-up:RATIO; with more fields, "
    "max-drop:0.01:sigmas=1"
)
METRIC_WORDS = (
    "unit of quality: accuracy, balanced-accuracy, f1:LABEL, f1-macro, matthews, recall-at-precision:PRECISION, mae, mse or "
    "spearman; by default accuracy, f1-macro where classes are uneven, mse for values"
)
MAX_DROP = "max-drop:0"
AUTO = "auto"


@dataclass
class CalibrateArguments(RowArguments, CertifiedArguments, TextArguments, DeviceArguments):
    """Which policy, for what, on which rows."""

    model: str = field(metadata={"help": "folder of a trained model with exits"})
    policy: str = field(default="confidence", metadata={"help": POLICY_WORDS})
    target: str | None = field(default=None, metadata={"help": f"{TARGET_WORDS}; max-drop:0 by default"})
    metric: str | None = field(default=None, metadata={"help": METRIC_WORDS})
    unlabelled: bool = field(default=False, metadata={"help": "choose for agreement with the full model; read no labels"})
    per_exit: bool | None = field(default=None, metadata={"help": "one threshold per exit; as the target prefers"})
    options: str = field(default="{}", metadata={"help": "options of the policy, JSON"})
    dataset: str | None = field(
        default=None, metadata={"help": f"rows to choose on; by default the model's {TRACE_FILE}; else a {SPLITS}"}
    )
    split: str | None = field(default=None, metadata={"help": f"split of the data set, {SLICES}; validation by default"})
    operating_point: str | None = field(
        default=None, metadata={"help": "keep the policy under this name; the default stays"}
    )
    form: str | None = field(
        default=None,
        metadata={"help": "bf16, int8 or onnx-int8: choose thresholds for that form, kept beside those of the model"},
    )
    keep_weak_exits: bool = field(default=False, metadata={"help": "do not close exits no better than a constant answer"})
    every: str | None = field(
        default=None,
        metadata={"help": "layers from exit to exit; auto takes the number that is the fastest here, by a measurement"},
    )
    performance_hint: str | None = field(
        default=None, metadata={"help": "what --every auto measures: throughput, the default, or latency"}
    )
    seed: int = field(default=0, metadata={"help": "of the rows a policy learns its own numbers from"})
    proposals: int | None = field(
        default=None, metadata={"help": "settings that a model which writes tries, each on all rows; 12 by default"}
    )
    batch_size: int | None = field(default=None, metadata={"help": "texts that a model writes together; 8 by default"})


ARGUMENTS = (CalibrateArguments,)


def run(args: CalibrateArguments) -> CommandResult:
    """Calibrate and save."""
    from ..calibration import calibrate
    from ..hub.save import save_calibrated
    from ..trace import ExitTrace
    from .calibrate_writer import calibrate_writer
    from .loading import load_model_or_writer
    from .texts import refuse_flags_of_writers, writes

    folder = Path(args.model)
    if not folder.is_dir():
        raise UsageError(f"{args.model} is no folder; calibrate writes into one. Download the model first.", path=folder)
    try:
        options = json.loads(args.options)
    except json.JSONDecodeError as error:
        raise UsageError(f"options is {args.options!r}; expected JSON ({error}).", field="options") from error
    model = load_model_or_writer(folder, args.device)
    if writes(model):
        return calibrate_writer(args, model, options)
    refuse_flags_of_writers(args, ("proposals",))
    served = model if args.form is None else _in_form(model, args)
    if args.dataset is not None:
        from .loading import reading_parts
        from .rows import collected

        trace, certified = collected(args, served, reading_parts(folder, model), labelled=not args.unlabelled)
    elif (folder / TRACE_FILE).is_file():
        trace, certified = ExitTrace.load(folder / TRACE_FILE), {}
        for flag in ("group_column", "list_column"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag} is of rows of --dataset; {TRACE_FILE} has no columns.", field=flag)
    else:
        raise UsageError(f"{folder} has no {TRACE_FILE}; name rows with --dataset and --split.", field="dataset")
    if args.unlabelled and trace.labelled:
        raise UsageError(f"--unlabelled is for rows of --dataset; those of {TRACE_FILE} have labels.", field="unlabelled")
    wishes = {
        "metric": args.metric,
        "per_exit": args.per_exit,
        "options": options,
        "keep_weak_exits": args.keep_weak_exits,
        "seed": args.seed,
        **certified,
    }
    policy, target, hint = args.policy, args.target or MAX_DROP, args.performance_hint
    if args.every == AUTO:
        from ..measuring.spacing import space_exits

        spacing = space_exits(served, trace, policy, target, performance_hint=hint or "throughput", **wishes)
        result = replace(spacing.result, notes=(*spacing.result.notes, spacing.why))
    elif hint is not None:
        raise UsageError(f"performance_hint is {hint!r}; it is for --every {AUTO}. Leave it out.", field="performance_hint")
    else:
        result = calibrate(trace, policy, target, every=_layers(args.every), **wishes)
    if args.form is not None:
        from ..forms.convert import keep_thresholds

        served.set_exit_policy(result)
        keep_thresholds(model, served)
        save_calibrated(model, folder)
        return CommandResult({"model": str(folder), "form": args.form, **result.to_dict()}, f"{args.form}: {result}")
    return keep(args, model, result)


def _layers(every: str | None) -> int:
    """Layers from exit to exit that a flag names."""
    try:
        return 1 if every is None else int(every)
    except ValueError as error:
        raise UsageError(f"every is {every!r}; expected a whole number of layers, or {AUTO}.", field="every") from error


def keep(args: CalibrateArguments, model: TorchExitModel, result: CalibrationResult) -> CommandResult:
    """Put a result into the model and its folder, as the default or under the name that the flags give."""
    from ..hub.save import save_calibrated

    point = args.operating_point
    if point is None:
        model.set_exit_policy(result)
    else:
        default = point if model.exit_policy is None else None
        model.set_operating_points({point: result}, default, keep_others=True)
    save_calibrated(model, args.model, result, point)
    return CommandResult({"model": args.model, "operating_point": point, **result.to_dict()}, str(result))


def _in_form(model: TorchExitClassifier, args: CalibrateArguments) -> Any:
    """The model in another form, without thresholds."""
    from ..forms.table import SAME_NUMBERS, made

    if args.form in SAME_NUMBERS:
        raise UsageError(
            f"form is {args.form!r}, which computes in float32: its thresholds are the model's own; leave it out.",
            field="form",
        )
    if args.dataset is None:
        raise UsageError(
            f"{TRACE_FILE} is the model's own; name rows for the form {args.form} with --dataset and --split.",
            field="dataset",
        )
    if args.operating_point is not None:
        raise UsageError("A form has one policy, and no operating points; leave --operating_point out.", field="form")
    return made(model, str(args.form))
