"""Choose thresholds on held-back rows, with no model in sight."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from ..errors import CalibrationError, UsageError
from ..metrics import f1, f1_name, uneven_classes
from ..policies.base import POLICIES, ExitPolicy
from ..problem_types import majority_quality, quality_name, row_quality
from ..trace import ExitTrace
from .replay import replay
from .result import CalibrationResult
from .search import Array, Curve, per_exit_curve, single_threshold_curve
from .targets import MaxDrop, Target, parse_target

CURVE_POINTS = 400
RARE_LOSS = 0.01  # F1 that may be lost beyond the loss of quality without a note


def calibrate(
    trace: ExitTrace,
    policy: str | ExitPolicy = "confidence",
    target: str | Target = "max-drop:0",
    *,
    per_exit: bool | None = None,
    options: dict[str, Any] | None = None,
    keep_weak_exits: bool = False,
    min_leavers: int = 10,
    learning_share: float = 0.2,
    seed: int = 0,
) -> CalibrationResult:
    """Choose a policy's thresholds so that a target is met on the rows of a trace.

    Exits that are no better than always giving the most frequent answer are closed and muted: they would agree with each
    other without knowing anything. Policies that learn numbers of their own do so on other rows than those that choose
    the thresholds. Candidate thresholds are all observed scores; the sweep over them is exact.

    Args:
        trace: labelled rows the exits were not trained on, from `collect_trace`.
        policy: a registered name, made for this trace, or a policy whose own numbers are kept.
        target: `MaxDrop`, `SpeedUp`, `LayerBudget`, `FinalLayerError`, or words such as "max-drop:0.01".
        per_exit: one threshold per exit instead of one for all; by default as the target prefers.
        options: fields of the policy or of its `learn`, such as `{"layer_cost": 0.4}`; with a name only.
        keep_weak_exits: leave exits open that are no better than the most frequent answer.
        min_leavers: with `per_exit`, the fewest rows an exit must take to be opened.
        learning_share: share of the rows a policy learns its own numbers from, in `(0, 1)`.
        seed: of the split between learning rows and threshold rows.

    Returns:
        The policy with thresholds, and what they did on the rows that chose them. Report figures on other rows.

    Raises:
        CalibrationError: for an empty or train-tagged trace, or a target that cannot be met.
        UnknownNameError: for an unknown policy or target.
        PolicyError: for options the policy refuses, or a problem type it cannot serve.
    """
    target = parse_target(target) if isinstance(target, str) else target
    _check(trace, target)
    per_exit = target.per_exit if per_exit is None else per_exit
    if not per_exit and not target.serves_single_threshold:
        raise CalibrationError(f"{target} sets each exit's own threshold; use per_exit=True.", field="per_exit")
    weak = () if keep_weak_exits else trace.dead_exits()
    rule, rows, learned_from = _make_policy(trace, policy, options, weak, learning_share, seed)

    scores, answers = rule.scan(rows)
    quality = row_quality(answers, rows.labels, rows.problem_type).numpy()
    cost = np.asarray(rows.costs)
    visible = scores.double().numpy().copy()
    visible[:, list(rule.muted)] = -np.inf
    if per_exit:
        rules = target.rules(quality, min_leavers)
        curve = per_exit_curve(visible, quality, cost, rules, rule.lowest_threshold, rule.counts)
    else:
        curve = single_threshold_curve(visible, quality, cost, rule.lowest_threshold, rule.counts)
    chosen = target.pick(curve)
    rule = rule.with_thresholds(_as_thresholds(curve.thresholds[chosen]))
    return _result(rule, rows, scores, answers, curve, target, weak, learned_from, seed)


def _check(trace: ExitTrace, target: Target) -> None:
    if not isinstance(target, Target):
        raise CalibrationError(
            f"target is {target!r}; expected a Target such as MaxDrop(0.01).", field="target", value=target
        )
    if trace.num_rows == 0:
        raise CalibrationError("The trace has no rows; collect it on held-back data first.", field="trace")
    if trace.split == "train":
        raise CalibrationError(
            "The trace is tagged 'train': on rows the exits were trained on, every exit looks better than it is. "
            "Collect a trace on rows held back from training.",
            field="split",
            value=trace.split,
        )


def _make_policy(
    trace: ExitTrace,
    policy: str | ExitPolicy,
    options: dict[str, Any] | None,
    weak: tuple[int, ...],
    learning_share: float,
    seed: int,
) -> tuple[ExitPolicy, ExitTrace, int]:
    """The policy without thresholds, the rows that will choose them, and how many rows taught it."""
    if isinstance(policy, ExitPolicy):
        if options:
            raise UsageError("options go with a policy's name; a ready policy keeps its own numbers.", field="options")
        if policy.num_exits != trace.num_exits:
            raise CalibrationError(
                f"The policy has {policy.num_exits} exits, the trace {trace.num_exits}; they must be of one model.",
                field="policy",
            )
        if policy.problem_type != trace.problem_type:
            raise CalibrationError(
                f"The policy serves {policy.problem_type}, the trace is {trace.problem_type}; they must be of one model.",
                field="problem_type",
            )
        if policy.exit_layers not in (None, trace.exit_layers):
            raise CalibrationError(
                f"The policy is for exits after layers {policy.exit_layers}, the trace has {trace.exit_layers}; "
                "they must be of one model.",
                field="exit_layers",
            )
        muted = tuple(sorted({*policy.muted, *weak}))
        closed = (None,) * (trace.num_exits - 1)
        return replace(policy, thresholds=closed, muted=muted, exit_layers=trace.exit_layers), trace, 0
    cls = POLICIES.get(policy)
    given = dict(options or {})
    given["muted"] = tuple(sorted({*given.get("muted", ()), *weak}))
    if not cls.learns:
        return cls.from_trace(trace, **given), trace, 0
    if not 0 < learning_share < 1:
        raise CalibrationError(
            f"learning_share is {learning_share!r}; expected a share between 0 and 1.", field="learning_share"
        )
    order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(seed))
    count = round(learning_share * trace.num_rows)
    if count == 0 or count == trace.num_rows:
        raise CalibrationError(
            f"{trace.num_rows} rows cannot be split into learning rows and threshold rows; collect more.", field="trace"
        )
    return cls.from_trace(trace.select(order[:count]), **given), trace.select(order[count:]), count


def _as_thresholds(vector: Array) -> tuple[float | None, ...]:
    return tuple(None if math.isnan(value) else float(value) for value in vector)


def _result(
    policy: ExitPolicy,
    rows: ExitTrace,
    scores: torch.Tensor,
    answers: torch.Tensor,
    curve: Curve,
    target: Target,
    weak: tuple[int, ...],
    learned_from: int,
    seed: int,
) -> CalibrationResult:
    outcome = {field.name: getattr(done, field.name) for done in [replay(policy, rows)] for field in fields(done)}
    del outcome["exit_layer"]
    thin = np.unique(np.linspace(0, len(curve.cost) - 1, CURVE_POINTS).round().astype(int))
    return CalibrationResult(
        **outcome,
        policy=policy,
        target=str(target),
        curve=tuple((float(curve.cost[k]), float(curve.quality[k]), _as_thresholds(curve.thresholds[k])) for k in thin),
        num_rows=rows.num_rows,
        num_learning_rows=learned_from,
        seed=seed,
        split=rows.split,
        dtype=str(rows.meta.get("dtype", "unknown")),
        fingerprint=rows.fingerprint,
        versions={name: version(name) for name in ("hf_earlyexit", "torch")},
        notes=(*_generosity(target, rows, float(curve.quality[0])), *_notes(policy, rows, scores, answers, weak)),
    )


def _generosity(target: Target, rows: ExitTrace, full: float) -> list[str]:
    """A note where a drop permits answers that know nothing."""
    constant = majority_quality(rows.labels, rows.problem_type)
    if not isinstance(target, MaxDrop) or not full - target.drop <= constant < full:
        return []
    return [
        f"a drop of {target.drop:g} from {full:.4f} permits answers no better than the most frequent one ({constant:.4f}); "
        "drop is in the unit of quality, so that 0.01 is one point of accuracy"
    ]


def _notes(
    policy: ExitPolicy, rows: ExitTrace, scores: torch.Tensor, answers: torch.Tensor, weak: tuple[int, ...]
) -> list[str]:
    notes = []
    if weak:
        layers = ", ".join(str(rows.exit_layers[index]) for index in weak)
        constant = majority_quality(rows.labels, rows.problem_type)
        notes.append(
            f"exits after layers {layers} are no better than the most frequent answer ({constant:.4f}): closed and muted"
        )
    if bool((policy.decide(scores) == rows.num_exits - 1).all()) and rows.num_exits > 1:
        open_scores = scores[:, :-1][torch.isfinite(scores[:, :-1])]
        score_range = (
            f"scores run from {float(open_scores.min()):.4g} to {float(open_scores.max()):.4g}"
            if open_scores.numel()
            else "no exit is open"
        )
        notes.append(f"no row leaves early: {score_range}, and no threshold among them meets the target on these rows")
    notes += _note_on_rare_classes(policy, rows, scores, answers)
    return notes


def _note_on_rare_classes(policy: ExitPolicy, rows: ExitTrace, scores: torch.Tensor, answers: torch.Tensor) -> list[str]:
    """A word where F1 falls further than the quality that the target looks at."""
    if not uneven_classes(rows.labels, rows.problem_type, rows.logits.shape[-1]):
        return []
    early = answers[torch.arange(rows.num_rows), policy.decide(scores)]
    f1s = [f1(logits, rows.labels, rows.problem_type) for logits in (rows.logits[:, -1], early)]
    quality = [float(row_quality(logits, rows.labels, rows.problem_type).mean()) for logits in (rows.logits[:, -1], early)]
    if f1s[0] - f1s[1] <= max(quality[0] - quality[1], 0.0) + RARE_LOSS:
        return []
    return [
        f"rare classes lose more than quality shows: {f1_name(rows.problem_type)} falls from {f1s[0]:.4f} to {f1s[1]:.4f}, "
        f"{quality_name(rows.problem_type)} from {quality[0]:.4f} to {quality[1]:.4f}; permit a smaller drop if they matter"
    ]
