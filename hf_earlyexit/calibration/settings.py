"""From a trace to the curve of settings that a policy can have on it, and to the one that a target picks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, UsageError
from ..policies.base import POLICIES, ExitPolicy
from ..policies.looking import LookingPolicy, Looks
from ..policies.scanning import LearningRows, OfLogits, Scan, values_by_parts
from ..problem_types import row_quality
from ..trace import ExitTrace, SomeRows, dead_exits
from ..values import unexpected
from .exit_by_exit import per_exit_curve
from .parts import Places, some
from .quality import Metric, worth
from .search import Array, Curve, exits_taken, means_along, of_leaving, single_threshold_curve, standard_error
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
    every: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a recipe came to on the rows of a trace.

    Attributes:
        policy: with thresholds.
        trace: all rows; places: of those that chose them. The others taught the policy its own numbers, or made the path.
        scan: what the policy makes of all rows; quality: of its answer at each exit `[N, E]`, whatever the metric.
        curve: of the settings that were looked at, thinned.
        weak: exits (0-based) that were muted.
    """

    policy: ExitPolicy
    trace: ExitTrace
    places: Places
    scan: Scan
    quality: Tensor
    curve: Curve
    weak: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Rows that chose the thresholds."""
        return self.trace.num_rows if self.places is None else len(self.places)

    @property
    def labels(self) -> Tensor:
        """Of these rows."""
        return some(self.trace.labels, self.places)

    @property
    def scores(self) -> Tensor:
        """Of these rows at each exit `[n, E]`."""
        return some(self.scan.scores, self.places)


class Pool:
    """Rows of a trace, and what a policy makes of them, once for all the parts of the rows that are looked at.

    Args:
        trace: the rows.
        metric: the unit of quality.
    """

    def __init__(self, trace: ExitTrace, metric: Metric) -> None:
        self.trace, self.metric = trace, metric
        self._scanned: tuple[Any, ...] | None = None  # the policy's numbers
        self._looks: Looks | None = None
        self._row_values: dict[Any, tuple[Tensor, ...]] = {}
        self._quality: Tensor | None = None

    def rows(self, places: Tensor) -> LearningRows:
        """Some of the rows, for a policy to learn from."""
        return SomeRows(self.trace, places, self.full_quality, self.row_values)

    def row_values(self, of_logits: OfLogits, exit_index: int) -> tuple[Tensor, ...]:
        """See `ExitTrace.row_values`; of all rows, once."""
        key = of_logits, exit_index
        if key not in self._row_values:
            self._row_values[key] = values_by_parts(of_logits, self.trace.signal(exit_index).logits)
        return self._row_values[key]

    @cached_property
    def full_quality(self) -> Tensor:
        """Quality of each exit's own answer `[N, E]`, whatever the metric: what tells weak exits."""
        return self.trace.quality

    def weak_exits(self, places: Places) -> tuple[int, ...]:
        """See `ExitTrace.dead_exits`, on some of the rows."""
        return dead_exits(some(self.full_quality, places), some(self.trace.labels, places), self.trace.problem_type)

    def scan(self, policy: ExitPolicy) -> Scan:
        """Scores and answers of all rows; thresholds do not matter to them."""
        if self._scanned != (numbers := policy.all_but("thresholds")):
            self._scanned, self._scan, self._quality = numbers, self._new_scan(policy), None
        return self._scan

    def _new_scan(self, policy: ExitPolicy) -> Scan:
        """What `policy.scan` gives; policies that differ in what they learned look at the rows once."""
        if not isinstance(policy, LookingPolicy):
            return policy.scan(self.trace)
        if self._looks is None or self._looks.sight != policy.sight:
            self._looks = Looks.of(policy, self.trace, self.row_values)
        return self._looks.scan(policy)

    def row_quality(self, policy: ExitPolicy) -> Tensor:
        """Quality of the policy's answer at each exit `[N, E]`, whatever the metric."""
        answers, trace = self.scan(policy).answers, self.trace
        return self.full_quality if answers is trace.logits else row_quality(answers, trace.labels, trace.problem_type)

    def quality(self, policy: ExitPolicy, places: Places) -> Array:
        """What the policy's answer at each exit is worth on some of the rows `[n, E]`."""
        answers, labels, problem_type = self.scan(policy).answers, self.trace.labels, self.trace.problem_type
        if not self.metric.is_mean:  # a row's part depends on the others
            part: Array = worth(self.metric, answers, labels, problem_type, places).numpy()
            return part
        if self._quality is None:
            known = self.metric.is_row_quality
            self._quality = self.row_quality(policy) if known else self.metric.per_row(answers, labels, problem_type)
        quality: Array = some(self._quality, places).numpy()
        return quality


class Choice(NamedTuple):
    """A policy with thresholds, the rows that chose them, the curve they were picked from, and muted exits."""

    policy: ExitPolicy
    places: Places
    curve: Curve
    weak: tuple[int, ...]


def choose(recipe: Recipe, pool: Pool, places: Places = None) -> Choice:
    """Follow a recipe on some rows of a trace, and on no others.

    Raises:
        CalibrationError: for rows that cannot be split, a policy of another model, or a target that cannot be met.
    """
    weak = () if recipe.keep_weak_exits else pool.weak_exits(places)
    taught: LearningRows = pool.trace
    if learns(recipe.policy):
        given = torch.arange(pool.trace.num_rows) if places is None else places
        learning, places = (given[part] for part in split_places(len(given), recipe.learning_share, recipe.seed))
        taught = pool.rows(learning)
    policy = make_policy(recipe, taught, weak)
    curve = policy_curve(recipe, policy, pool, places)
    thresholds = as_thresholds(curve.thresholds[recipe.target.pick(curve)])
    return Choice(policy.with_thresholds(thresholds), places, curve, weak)


def choose_setting(recipe: Recipe, pool: Pool) -> Setting:
    """Follow a recipe on all rows of a trace."""
    policy, places, curve, weak = choose(recipe, pool)
    return setting_of(pool, policy, places, thinned(curve), weak)


def setting_of(pool: Pool, policy: ExitPolicy, places: Places, curve: Curve, weak: tuple[int, ...]) -> Setting:
    """What a choice came to on some rows of a pool."""
    return Setting(
        policy=policy,
        trace=pool.trace,
        places=places,
        scan=pool.scan(policy),
        quality=pool.row_quality(policy),
        curve=curve,
        weak=weak,
    )


def policy_curve(recipe: Recipe, policy: ExitPolicy, pool: Pool, places: Places) -> Curve:
    """What a policy with closed exits costs and is worth at every setting, on some rows."""
    if recipe.metric.is_mean:
        return _mean_curve(recipe, policy, pool, places)
    return curve_of(thinned(_mean_curve(recipe, policy, pool, places)).thresholds[:], policy, pool, places)


def _mean_curve(recipe: Recipe, policy: ExitPolicy, pool: Pool, places: Places) -> Curve:
    """The same in the mean of what each row's answer is worth."""
    quality, scores, cost = pool.quality(policy, places), pool.scan(policy).scores, np.asarray(pool.trace.costs)
    visible = some(scores, places).double().numpy()  # -inf at muted exits
    if not recipe.per_exit:
        return single_threshold_curve(visible, quality, cost, policy.lowest_threshold, policy.counts)
    rules = recipe.target.rules(quality, recipe.min_leavers)
    return per_exit_curve(visible, quality, cost, rules, policy.lowest_threshold, policy.counts)


def curve_of(thresholds: Array, policy: ExitPolicy, pool: Pool, places: Places = None) -> Curve:
    """What given settings cost and are worth on some rows.

    Args:
        thresholds: `[K, E - 1]`, nan where an exit is closed.
        policy: whose thresholds they are.
        pool, places: the rows.
    """
    trace, metric, (scores, answers), cost = pool.trace, pool.metric, pool.scan(policy), np.asarray(pool.trace.costs)
    visible = np.asfortranarray(some(scores, places).double().numpy())
    if metric.is_mean:
        quality = pool.quality(policy, places)
        gain, full = quality - quality[:, -1:], float(quality[:, -1].mean())
        means = means_along(thresholds, visible, of_leaving(cost, gain))
        return Curve(thresholds, means[0], means[1] + full, standard_error(means[1], means[2], len(gain)))
    full_logits, labels = some(trace.logits[:, -1], places), some(trace.labels, places)
    compare, costs, compared = metric.at_exits(answers, full_logits, labels, trace.problem_type, places), [], []
    for vector in thresholds:
        taken = exits_taken(visible, vector)
        costs.append(cost[taken].mean())
        compared.append(compare(torch.from_numpy(taken)))
    values, _, errors = np.array(compared).T
    return Curve(thresholds, np.array(costs), values, errors)


def thinned(curve: Curve) -> Curve:
    """At most `CURVE_POINTS` settings, the first and the last among them, evenly spaced in mean cost."""
    if len(curve.cost) <= CURVE_POINTS:
        return curve
    wanted = np.linspace(curve.cost[0], curve.cost[-1], CURVE_POINTS)
    falling = np.minimum.accumulate(curve.cost)
    kept = np.unique(np.append(np.searchsorted(-falling, -wanted).clip(max=len(falling) - 1), [0, len(falling) - 1]))
    return Curve(curve.thresholds[kept], curve.cost[kept], curve.quality[kept], curve.standard_error[kept])


def as_thresholds(vector: Array) -> tuple[float | None, ...]:
    """Thresholds as a policy takes them, from numbers with nan for closed exits."""
    return tuple(None if math.isnan(value) else float(value) for value in vector)


def learns(policy: str | ExitPolicy) -> bool:
    """Whether the policy is yet to learn numbers of its own from rows."""
    return not isinstance(policy, ExitPolicy) and POLICIES.get(policy).learns


def make_policy(recipe: Recipe, rows: LearningRows, weak: tuple[int, ...]) -> ExitPolicy:
    """The policy with every exit closed; one that learns does so from all of these rows."""
    policy, left_out = recipe.policy, {*weak, *between(rows.exit_layers, recipe.every)}
    if isinstance(policy, ExitPolicy):
        _check_fits(policy, rows)
        muted = tuple(sorted({*policy.muted, *left_out}))
        return replace(policy, thresholds=(None,) * (rows.num_exits - 1), muted=muted, exit_layers=rows.exit_layers)
    options = {**recipe.options, "muted": tuple(sorted({*recipe.options.get("muted", ()), *left_out}))}
    return POLICIES.get(policy).from_trace(rows, **options)


def between(exit_layers: Sequence[int], every: int) -> tuple[int, ...]:
    """Exits (0-based) that are left out where only every so many layers one is asked, counted from the last."""
    return tuple(index for index, layer in enumerate(exit_layers) if (exit_layers[-1] - layer) % every)


def split_places(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Places of two parts of `count` rows, drawn at random: a share of them, and the others.

    Raises:
        CalibrationError: if one of them would be empty.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    first = round(share * count)
    if first in (0, count):
        raise CalibrationError(
            f"{count} rows cannot be split into learning rows and threshold rows; collect more.", field="trace"
        )
    return order[:first], order[first:]


def _check_fits(policy: ExitPolicy, trace: LearningRows) -> None:
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
        UsageError: for options beside a ready policy, or that are no dict of names.
    """
    if options is not None and not (isinstance(options, dict) and all(isinstance(name, str) for name in options)):
        raise unexpected("options", options, "a dict of the policy's own numbers by name")
    if isinstance(policy, ExitPolicy) and options:
        raise UsageError("options go with a policy's name; a ready policy keeps its own numbers.", field="options")
    return dict(options or {})
