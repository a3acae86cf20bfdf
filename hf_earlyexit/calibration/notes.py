"""What a calibration says beside its numbers, in sentences."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..errors import PermitsEverything
from ..metrics import f1, f1_name, uneven_classes
from ..policies.base import ExitPolicy
from ..problem_types import majority_quality, quality_name, row_quality
from ..trace import ExitTrace
from .copies import num_copies
from .parts import left_with, some
from .quality import Metric
from .result import CalibrationResult
from .settings import Setting
from .targets import MaxDrop, Target

OWN_FILES = tuple(os.path.dirname(file) + os.sep for file in (errors.__file__, torch.__file__))
RARE_LOSS = 0.01  # F1 that may be lost beyond the loss of quality without a note


def on_rows(trace: ExitTrace, named: Any, metric: Metric, certified: bool) -> list[str]:
    """Which metric uneven classes got where none was named, and rows that stand there twice.

    Args:
        trace: the rows.
        named: the metric that the caller gave, or `None`.
        metric: the one that was taken.
        certified: whether a promise is asked for.
    """
    notes = []
    if not trace.labelled:
        notes.append("the rows have no labels: quality is agreement with the full model, which may itself be wrong")
    if named is None and not metric.is_mean:
        most = float(torch.bincount(trace.labels).max()) / trace.num_rows
        head = f"classes are uneven (the largest is {most:.0%} of the rows)"
        if certified:
            notes.append(f"{head}; what is certified is in accuracy: by='label' certifies each class")
        else:
            notes.append(f"{head}, so quality is {metric.title(trace.problem_type)}; pass metric='accuracy' for that")
    if certified and (doubles := num_copies(trace)):
        notes.append(
            f"{doubles} of {trace.num_rows} rows are copies of others, so rows are not drawn independently: leave copies "
            "out, or the promise is worth less than it says"
        )
    return notes


def on_ready_policy(policy: str | ExitPolicy, learned_from: ExitTrace | None) -> list[str]:
    """What only the caller can know of a ready policy: which rows taught it."""
    if not isinstance(policy, ExitPolicy) or not policy.learns or learned_from is not None:
        return []
    return [
        f"the {policy.name} policy came with numbers that it learned elsewhere: the promise holds only if none of these "
        "rows taught it; pass learned_from=... to have that checked"
    ]


def on_drop(target: Target, full: float) -> list[str]:
    """A drop of all the full model's quality, which gives the model away; it is warned of as well.

    Args:
        target: what thresholds are chosen for.
        full: quality of the full model. Where it cannot be lost, as minus squared errors, it is never above 0.
    """
    if not isinstance(target, MaxDrop) or not 0 < full <= target.drop:
        return []
    note = (
        f"a drop of {target.drop:g} permits to lose all of the full model's quality, {full:.4f}, so any answer will do; "
        f"quality runs from 0 to 1: one point is 0.01, {target.drop:g} points are {target.drop / 100:g}"
    )
    warning = PermitsEverything(f"{note[0].upper()}{note[1:]}.", f"max-drop:{target.drop / 100:g}")
    warnings.warn(warning, stacklevel=_callers_level())
    return [note]


def _callers_level() -> int:
    """The level, seen from who warns, of the first frame outside this library and torch, whose decorators lie between."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(OWN_FILES):
        frame, level = frame.f_back, level + 1
    return level


def on_target(target: Target, setting: Setting) -> list[str]:
    """A drop that permits answers that know nothing."""
    full = float(setting.curve.quality[0])
    if notes := on_drop(target, full):
        return notes
    constant = majority_quality(setting.labels, setting.trace.problem_type)
    if not isinstance(target, MaxDrop) or not full - target.drop <= constant < full:
        return []
    return [
        f"a drop of {target.drop:g} from {full:.4f} permits answers no better than the most frequent one ({constant:.4f}); "
        "drop is in the unit of quality, so that 0.01 is one point of accuracy"
    ]


def on_setting(setting: Setting) -> list[str]:
    """Muted exits, and a setting at which no row leaves early."""
    trace, scores, notes = setting.trace, setting.scores, []
    if setting.weak:
        layers = ", ".join(str(trace.exit_layers[index]) for index in setting.weak)
        constant = majority_quality(setting.labels, trace.problem_type)
        notes.append(
            f"exits after layers {layers} are no better than the most frequent answer ({constant:.4f}): closed and muted"
        )
    if bool((setting.policy.decide(scores) == trace.num_exits - 1).all()) and trace.num_exits > 1:
        open_scores = scores[:, :-1][torch.isfinite(scores[:, :-1])]
        score_range = (
            f"scores run from {float(open_scores.min()):.4g} to {float(open_scores.max()):.4g}"
            if open_scores.numel()
            else "no exit is open"
        )
        notes.append(f"no row leaves early: {score_range}, and no threshold among them meets the target on these rows")
    return notes


def on_rare_classes(setting: Setting, metric: Metric) -> list[str]:
    """A word where F1 falls further than the quality that the target looks at."""
    labels, problem_type, last = setting.labels, setting.trace.problem_type, setting.trace.logits[:, -1]
    if not metric.is_mean or not uneven_classes(labels, problem_type, last.shape[-1]):
        return []

    def judged(logits: Tensor) -> tuple[float, float]:
        return f1(logits, labels, problem_type), float(row_quality(logits, labels, problem_type).mean())

    full = judged(some(last, setting.places))
    early = judged(left_with(setting.scan.answers, setting.places, setting.policy.decide(setting.scores)))
    f1s, quality = zip(full, early, strict=True)
    if f1s[0] - f1s[1] <= max(quality[0] - quality[1], 0.0) + RARE_LOSS:
        return []
    return [
        f"rare classes lose more than quality shows: {f1_name(problem_type)} falls from {f1s[0]:.4f} to {f1s[1]:.4f}, "
        f"{quality_name(problem_type)} from {quality[0]:.4f} to {quality[1]:.4f}; permit a smaller drop if they matter"
    ]


def on_expectation(target: Target, result: CalibrationResult) -> list[str]:
    """Where the target is not likely to be kept on other rows, or more evidence would buy more."""
    notes, expected, promise = [], result.expected, result.promise
    if expected is not None and target.promised_drop is not None:
        short = -expected.difference - target.promised_drop
        if short > expected.standard_error:
            notes.append(
                f"rows not seen can be expected to lose {-expected.difference:.4f}, more than the "
                f"{target.promised_drop:g} asked for (standard error {expected.standard_error:.4f}): keep a reserve with "
                f"sigmas=1, choose on more rows, or certify with 'certified:{max(target.promised_drop, 0.01):g}@0.95'"
            )
    if promise is not None and promise.rows_needed is not None:
        notes.append(f"about {promise.rows_needed:,} certifying {promise.unit} would allow the next faster setting")
    return notes
