"""`calibrate` for models that write: thresholds by texts that they really write, or drafts that lose nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..errors import UsageError
from ..modeling.protocol import TorchExitWriter
from .calibrate import MAX_DROP, CalibrateArguments, keep
from .command_result import CommandResult
from .rows import certified_columns
from .texts import WritingTask, writing_task_of

CLASSIFIERS_ONLY = (
    "metric",
    "unlabelled",
    "per_exit",
    "form",
    "keep_weak_exits",
    "every",
    "performance_hint",
    "label_names",
    "list_column",
)


def calibrate_writer(args: CalibrateArguments, model: TorchExitWriter, options: dict[str, Any]) -> CommandResult:
    """Calibrate a captioner or language model and save it.

    Args:
        args: flags.
        model: that has been loaded from the folder.
        options: of the policy.

    Raises:
        UsageError: for flags that do not fit.
    """
    from ..generation.calibrate import calibrate_generation

    task = writing_task_of(args, model, "validation", CLASSIFIERS_ONLY)
    if args.lossless:
        return _calibrate_drafts(args, model, task, options)
    proposals: dict[str, Any] = {} if args.proposals is None else {"proposals": args.proposals}
    result = calibrate_generation(
        model,
        task.prompts,
        args.policy,
        args.target or MAX_DROP,
        **task.parts,
        references=task.references,
        options=options or None,
        seed=args.seed,
        split=args.split or "validation",
        batch_size=task.batch_size,
        **proposals,
        **certified_columns(args, task.rows),
        **task.generation,
    )
    return keep(args, model, result)


def _calibrate_drafts(
    args: CalibrateArguments, model: TorchExitWriter, task: WritingTask, options: dict[str, Any]
) -> CommandResult:
    from ..generation.checks import LOSSLESS
    from ..generation.draft_calibration import calibrate_drafts
    from ..hub.save import save_calibrated

    for name, value in (
        ("target", args.target),
        ("label_column", args.label_column),
        ("group_column", args.group_column),
        ("proposals", args.proposals),
    ):
        if value is not None:
            raise UsageError(
                f"--{name} is given, but lossless texts are the full model's own, so that only time is left to choose for; "
                "leave it out.",
                field=name,
                value=value,
            )
    if options:
        raise UsageError("--options go with policies that learn; drafts take a policy by its name.", field="options")
    calibration = calibrate_drafts(
        model, task.prompts, args.policy, **task.parts, batch_size=task.batch_size, **task.generation
    )
    point = args.operating_point or LOSSLESS
    calibration.serve(model, point)
    save_calibrated(model, args.model)
    values = {
        "model": args.model, "operating_point": point, "policy": calibration.policy.to_dict(), "drafts": calibration.drafts,
        "texts": calibration.num_texts, "tokens": calibration.num_tokens, "expected": asdict(calibration.expected),
        "expected_speed_up": calibration.expected.speed_up, "measured_speed_up": calibration.measured_speed_up,
        "costs": calibration.costs._asdict(),
    }  # fmt: skip
    following = f"caption {args.model} PICTURES" if model.crosses else f"generate {args.model}"
    text = f"{calibration}\nkept as the operating point {point!r}; next: hf-earlyexit {following} --lossless true"
    if not calibration.policy.may_leave:
        text += "\nnote: plain decoding is the fastest here, so nothing is drafted"
    return CommandResult(values, text)
