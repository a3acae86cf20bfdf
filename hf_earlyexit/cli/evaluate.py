"""Say what early exit does to a data set: quality and layers, and on request time.

    hf-earlyexit evaluate --model bert-with-exits --dataset reviews --split test
    hf-earlyexit evaluate --model bert-with-exits --dataset reviews --time true --json true
    hf-earlyexit evaluate --model llama-with-exits --dataset prompts.txt --lossless true --time true

Layers are those that were really run. The measured speed-up compares early exit with the full model, in turns on this
machine. Captioners and language models write, and need no labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..values import check_whole
from .arguments import SLICES, SPLITS, DeviceArguments, RowArguments, TextArguments
from .command_result import CommandResult

if TYPE_CHECKING:
    from torch import Tensor

    from ..calibration.quality import Comparison, Metric
    from ..calibration.result import CalibrationResult
    from ..modeling.protocol import ExitClassifier
    from ..trace import ExitTrace


@dataclass
class EvaluateArguments(RowArguments, TextArguments, DeviceArguments):
    """Which model on which rows."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits and a policy"})
    dataset: str = field(metadata={"help": SPLITS})
    split: str | None = field(
        default=None,
        metadata={"help": f"split of the data set, {SLICES}; neither trained nor calibrated on; test by default"},
    )
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to use"})
    metric: str | None = field(default=None, metadata={"help": "unit of quality; by default the calibration's, or accuracy"})
    time: bool = field(default=False, metadata={"help": "measure the time of both, in turns"})
    repeats: int = field(default=5, metadata={"help": "rounds of measuring"})
    max_batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens in a batch; as suits the device"})
    batch_size: int | None = field(default=None, metadata={"help": "texts that a model writes together; 8 by default"})


ARGUMENTS = (EvaluateArguments,)


def run(args: EvaluateArguments) -> CommandResult:
    """Predict early and in full, compare."""
    from ..data.labelling import Labelling
    from ..modeling.configuration import EXACT
    from ..serving.reader import reader_for, reads_images
    from .evaluate_writer import evaluate_writer
    from .loading import load_model_or_writer, reading_parts
    from .rows import read_rows, rows_and_labelling
    from .texts import refuse_flags_of_writers, writes

    check_whole(1, repeats=args.repeats)
    model = load_model_or_writer(args.model, args.device)
    if args.operating_point == EXACT:
        raise UsageError(
            f"At {EXACT!r} every row runs through all layers; there is nothing to compare.", field="operating_point"
        )
    if writes(model):
        return evaluate_writer(args, model)
    refuse_flags_of_writers(args)
    if model.policy_at(args.operating_point) is None:
        raise UsageError(f"{args.model} has no exit policy; run `hf-earlyexit calibrate` first.", field="model")
    rows = read_rows(args, args.dataset, args.split, "test", reads_images(model))
    rows, _ = rows_and_labelling(args, rows, Labelling.of_model(model.config))
    parts = reading_parts(args.model, model)
    encoded = reader_for(model, **parts).encode_all(rows)  # once, so that measuring does not tokenize
    encoded = encoded[:] if args.time else encoded  # pictures are opened again and again otherwise: they take much room
    values = figures(model, encoded, rows["label"][:], parts, args)
    names = [str(name) for _, name in sorted(model.config.id2label.items())]
    return CommandResult(values, _sentences(values, names))


def figures(
    model: ExitClassifier, rows: Any, labels: list[Any], parts: dict[str, Any], args: EvaluateArguments
) -> dict[str, Any]:
    """What early exit does to the rows, as plain numbers."""
    import torch

    from ..calibration.by_class import answers_given, class_reports
    from ..calibration.quality import find_metric
    from ..modeling.configuration import EXACT
    from ..serving.collect import collect_trace
    from ..serving.predict import predict

    def answer(early_exit: bool) -> Any:
        point = args.operating_point if early_exit else EXACT
        return predict(model, rows, max_batch_tokens=args.max_batch_tokens, operating_point=point)

    problem, depth = model.config.resolved_problem_type, model.exit_layers[-1]
    early = answer(True)
    truth = torch.tensor(labels)
    chosen = _chosen(args)
    metric = find_metric(args.metric or (None if chosen is None else chosen.metric), problem)
    compared = metric.compare(early.logits, answer(False).logits, truth, problem)
    layers = early.exit_layer.double()
    trace = collect_trace(model, rows, labels=labels, **parts, split="evaluated", progress=False)
    given, full = (answers_given(logits, problem) for logits in (early.logits, trace.logits[:, -1]))
    classes = class_reports(given, full, truth, trace.logits.shape[-1], problem)
    policy = model.policy_at(args.operating_point)
    assert policy is not None  # who calls has looked
    values = {
        "policy": policy.name,
        "measure": metric.title(problem),
        "rows": len(truth),
        **compared._asdict(),
        "expected": None if chosen is None or chosen.expected is None else asdict(chosen.expected),
        "mean_layers": float(layers.mean()),
        "num_layers": depth,
        "layer_speed_up": float(depth / layers.mean()),
        "exit_shares": {str(layer): float((layers == layer).double().mean()) for layer in model.exit_layers},
        "classes": [asdict(report) for report in classes],
        "static": _static(trace, metric, early.logits, float(layers.mean())),
        "target": verdict_on(args, compared, layers, depth),
    }
    if args.time:
        runs = {"full": lambda: answer(False), "early": lambda: answer(True)}
        values["time"] = measured(runs, args.repeats, model.device.type)
    return values


def measured(runs: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, Any]:
    """Seconds of the runs "full" and "early", in turns."""
    import torch

    from ..timing import compare_speed

    timings = compare_speed(runs, "full", repeats)
    return {
        "seconds": timings["early"].seconds,
        "full_seconds": timings["full"].seconds,
        "speed_up": timings["early"].speed_up,
        "middle_half": [timings["early"].low, timings["early"].high],
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _static(trace: ExitTrace, metric: Metric, early: Tensor, mean_layers: float) -> dict[str, Any]:
    """The model simply cut off at the first exit that costs at least as much as early exit does.

    Args:
        trace: of the rows.
        metric: the unit of quality.
        early: the early answers `[N, C]`.
        mean_layers: their cost.
    """
    index = next(place for place, layer in enumerate(trace.exit_layers) if layer >= mean_layers - 1e-9)
    compared = metric.compare(early, trace.logits[:, index], trace.labels, trace.problem_type)
    return {
        "layer": trace.exit_layers[index],
        "quality": compared.full_quality,
        "gain": compared.quality - compared.full_quality,
        "standard_error": compared.standard_error,
    }


def _chosen(args: EvaluateArguments) -> CalibrationResult | None:
    """How the thresholds were chosen, where the model's folder says it."""
    from ..hub.save import by_name, load_calibrations
    from ..modeling.configuration import DEFAULT

    calibration = load_calibrations(args.model)
    return None if calibration is None else by_name(calibration).get(args.operating_point or DEFAULT)


def verdict_on(args: EvaluateArguments, compared: Comparison, layers: Tensor, depth: int) -> dict[str, Any] | None:
    """Whether the target that thresholds were chosen for was kept on these rows, and by how much.

    `margin` is in the unit of the target, at least 0 where it was kept; `None` where the model does not say its target, or
    it is about another risk than lost quality.
    """
    from ..calibration.targets import LayerBudget, SpeedUp, parse_target

    chosen = _chosen(args)
    if chosen is None:
        return None
    target = parse_target(chosen.target)
    allowed = target.promised_drop
    if allowed is not None:
        margin, error = allowed - (compared.full_quality - compared.quality), compared.standard_error
    elif isinstance(target, (SpeedUp, LayerBudget)):
        most = depth / target.ratio if isinstance(target, SpeedUp) else target.layers
        margin, error = most - float(layers.mean()), float(layers.std(correction=0) / len(layers) ** 0.5)
    else:
        return None
    unit = "quality" if allowed is not None else "layers"
    return {"target": chosen.target, "kept": margin >= -1e-12, "margin": margin, "standard_error": error, "unit": unit}


def _sentences(values: dict[str, Any], names: list[str]) -> str:
    from ..calibration.by_class import ClassReport, class_lines

    static = values["static"]
    lines = [
        f"{values['policy']} on {values['rows']} rows",
        f"{values['measure']} {values['quality']:.4f} against {values['full_quality']:.4f} of the full model "
        f"({values['quality'] - values['full_quality']:+.4f}, standard error {values['standard_error']:.4f})",
        f"mean layers {values['mean_layers']:.2f} of {values['num_layers']}: layer speed-up {values['layer_speed_up']:.2f}x",
        *_expectation(values["expected"]),
        judgement(values["target"]),
        f"a model cut off after layer {static['layer']} reaches {static['quality']:.4f}: early exit is "
        f"{abs(static['gain']):.4f} {'above' if static['gain'] >= 0 else 'below'} it (standard error "
        f"{static['standard_error']:.4f})",
        "leaving after layer " + ", ".join(f"{layer}: {share:.1%}" for layer, share in values["exit_shares"].items()),
        *class_lines([ClassReport(**report) for report in values["classes"]], names),
    ]
    return "\n".join(lines + timing_words(values))


def timing_words(values: dict[str, Any]) -> list[str]:
    """What was measured in time, where it was."""
    if "time" not in values:
        return []
    time = values["time"]
    low, high = time["middle_half"]
    return [
        f"measured speed-up {time['speed_up']:.2f}x (middle half {low:.2f} to {high:.2f}): {time['seconds']:.3f} s "
        f"against {time['full_seconds']:.3f} s, {time['device']}, {time['threads']} threads"
    ]


def _expectation(expected: dict[str, Any] | None) -> list[str]:
    if expected is None:
        return []
    return [
        f"the calibration expected {expected['difference']:+.4f} (standard error {expected['standard_error']:.4f}) at "
        f"{expected['mean_layers']:.2f} mean layers on rows that did not choose"
    ]


def judgement(verdict: dict[str, Any] | None) -> str:
    """What `verdict_on` found, in words."""
    if verdict is None:
        return "the folder does not say what the thresholds were chosen for, so no target is judged"
    margin, error, unit = verdict["margin"], verdict["standard_error"], verdict["unit"]
    how = f"{abs(margin):.4f} {unit} {'to spare' if verdict['kept'] else 'beyond it'}, standard error {error:.4f}"
    if verdict["kept"]:
        doubt = "" if margin >= error else "; other rows may well miss it"
        return f"target {verdict['target']}: kept on these rows ({how}{doubt})"
    doubt = "; so little may be chance" if -margin <= 2 * error else ""
    return f"target {verdict['target']}: not kept on these rows ({how}{doubt})"
