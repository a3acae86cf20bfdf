"""From a trace to the curve of settings that a policy can have on it, and to the one that a target picks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, UsageError
from ..policies.base import POLICIES, ExitPolicy
from ..trace import ExitTrace
from .quality import Metric
from .search import Array, Curve, exits_taken, per_exit_curve, single_threshold_curve
from .targets import Target

CURVE_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How thresholds are to be chosen, whatever the rows: see `calibrate` for each field."""

    policy: str | ExitPolicy
    target: Target
    metric: Metric
    per_exit: bool
    options: dict[str, Any]
    keep_weak_exits: bool
    min_leavers: int
    learning_share: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a recipe came to on the rows of a trace.

    Attributes:
        policy: with thresholds.
        rows: that chose them; num_learning_rows: others, that taught the policy its own numbers.
        scores: of every exit on the rows `[N, E]`.
        curve: of all settings that were looked at.
        weak: exits (0-based) that were muted.
    """

    policy: ExitPolicy
    rows: ExitTrace
    num_learning_rows: int
    scores: Tensor
    curve: Curve
    weak: tuple[int, ...]


def choose_setting(recipe: Recipe, trace: ExitTrace) -> Setting:
    """Follow a recipe on the rows of a trace.

    Raises:
        CalibrationError: for rows that cannot be split, a policy of another model, or a target that cannot be met.
    """
    weak = () if recipe.keep_weak_exits else trace.dead_exits()
    taught = rows = trace
    if learns(recipe.policy):
        taught, rows = map(trace.select, split_places(trace.num_rows, recipe.learning_share, recipe.seed))
    policy = make_policy(recipe, taught, weak)
    scores, curve = policy_curve(recipe, policy, rows)
    policy = policy.with_thresholds(as_thresholds(curve.thresholds[recipe.target.pick(curve)]))
    return Setting(
        policy=policy, rows=rows, num_learning_rows=trace.num_rows - rows.num_rows, scores=scores, curve=curve, weak=weak
    )


def policy_curve(recipe: Recipe, policy: ExitPolicy, rows: ExitTrace) -> tuple[Tensor, Curve]:
    """Every exit's scores `[N, E]`, and what a policy with closed exits costs and is worth at every setting."""
    scores, answers = policy.scan(rows)
    quality = recipe.metric.per_row(answers, rows.labels, rows.problem_type).numpy()
    cost = np.asarray(rows.costs)
    visible = scores.double().numpy()  # -inf at muted exits
    if recipe.per_exit:
        rules = recipe.target.rules(quality, recipe.min_leavers)
        curve = per_exit_curve(visible, quality, cost, rules, policy.lowest_threshold, policy.counts)
    else:
        curve = single_threshold_curve(visible, quality, cost, policy.lowest_threshold, policy.counts)
    if not recipe.metric.is_mean:
        curve = curve_of(thinned(curve).thresholds, visible, answers, rows, recipe.metric)
    return scores, curve


def curve_of(thresholds: Array, scores: Array, answers: Tensor, rows: ExitTrace, metric: Metric) -> Curve:
    """What given settings cost and are worth on some rows.

    Args:
        thresholds: `[K, E - 1]`, nan where an exit is closed.
        scores: `[N, E]`, -inf at muted exits.
        answers: of the policy at each exit `[N, E, C]`.
        rows: the rows.
        metric: the unit.
    """
    every, cost, full = torch.arange(rows.num_rows), np.asarray(rows.costs), rows.logits[:, -1]
    exits = [torch.from_numpy(exits_taken(scores, vector)) for vector in thresholds]
    compared = [metric.compare(answers[every, taken], full, rows.labels, rows.problem_type) for taken in exits]
    quality, _, error = np.array(compared).T
    return Curve(thresholds, np.array([cost[taken.numpy()].mean() for taken in exits]), quality, error)


def thinned(curve: Curve) -> Curve:
    """At most `CURVE_POINTS` settings, the first and the last among them, evenly spaced in mean cost."""
    if len(curve.cost) <= CURVE_POINTS:
        return curve
    wanted = np.linspace(curve.cost[0], curve.cost[-1], CURVE_POINTS)
    falling = np.minimum.accumulate(curve.cost)
    kept = np.unique(np.append(np.searchsorted(-falling, -wanted).clip(max=len(falling) - 1), [0, len(falling) - 1]))
    return Curve(*(part[kept] for part in curve))


def as_thresholds(vector: Array) -> tuple[float | None, ...]:
    """Thresholds as a policy takes them, from numbers with nan for closed exits."""
    return tuple(None if math.isnan(value) else float(value) for value in vector)


def learns(policy: str | ExitPolicy) -> bool:
    """Whether the policy is yet to learn numbers of its own from rows."""
    return not isinstance(policy, ExitPolicy) and POLICIES.get(policy).learns


def make_policy(recipe: Recipe, rows: ExitTrace, weak: tuple[int, ...]) -> ExitPolicy:
    """The policy with every exit closed; one that learns does so from all of these rows."""
    policy = recipe.policy
    if isinstance(policy, ExitPolicy):
        _check_fits(policy, rows)
        muted = tuple(sorted({*policy.muted, *weak}))
        return replace(policy, thresholds=(None,) * (rows.num_exits - 1), muted=muted, exit_layers=rows.exit_layers)
    options = {**recipe.options, "muted": tuple(sorted({*recipe.options.get("muted", ()), *weak}))}
    return POLICIES.get(policy).from_trace(rows, **options)


def split_places(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of two parts of `count` rows, drawn at random: a share of them, and the others.

    Raises:
        CalibrationError: if one of them would be empty.
    """
    if not 0 < share < 1:
        raise CalibrationError(
            f"learning_share is {share!r}; expected a share between 0 and 1.", field="learning_share", value=share
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = round(share * count)
    if first in (0, count):
        raise CalibrationError(
            f"{count} rows cannot be split into learning rows and threshold rows; collect more.", field="trace"
        )
    return order[:first], order[first:]


def _check_fits(policy: ExitPolicy, trace: ExitTrace) -> None:
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


def check_options(policy: str | ExitPolicy, options: dict[str, Any] | None) -> dict[str, Any]:
    """Options for a policy's name.

    Raises:
        UsageError: for options beside a ready policy.
    """
    if isinstance(policy, ExitPolicy) and options:
        raise UsageError("options go with a policy's name; a ready policy keeps its own numbers.", field="options")
    return dict(options or {})
