"""Thresholds with a promise that holds on rows nobody has seen.

A path of settings, from the full model to the cheapest, is fixed on some rows; other rows say how far along it the risk
stays below a limit. Because the certifying rows did not shape the path, and the walk ends at the first doubt, the chance
that the setting picked breaks the promise is at most one minus the confidence.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import CalibrationError
from ..policies.base import ExitPolicy
from ..trace import ExitTrace
from ..values import check_choice, is_real, shown
from .along import LossesAlong
from .evidence import STARTS, fallback, fixed_sequence, holm, least_rows
from .promise import GroupEvidence, Promise
from .risks import RISKS, Losses, Plan, edge, groups_of, losses_of
from .search import Array, Curve
from .settings import Pool, Recipe, Setting, as_thresholds, curve_of, make_policy, policy_curve, split_places, thinned
from .targets import TARGETS, Target

PROCEDURES = ("fixed-sequence", "fallback", "crc")


@TARGETS.register("certified")
@dataclass(frozen=True)
class Certified(Target):
    """The cheapest setting that is certified to keep a risk below a limit on rows not seen.

    Args:
        drop: the limit of the mean loss: 0.01 is one point; in (0, 1).
        confidence: over the draw of the certifying rows, in [0.5, 1); not used by "crc".
        risk: "drop": the full model's quality minus the early answer's, gains counted; "harm": the full model is right and
            the early answer wrong; "disagreement": they differ, which needs no labels.
        procedure: "fixed-sequence" walks the path until the first setting that cannot be certified; "fallback" shares the
            error among several starts; "crc" (conformal risk control) bounds the risk on average over draws only.
        by: `None`, or "label" or "group": each label's rows, or each slice given in `calibrate(groups=...)`, keep it.
        bound: for regression, the largest difference in quality that counts.

    Examples:
        >>> from hf_earlyexit.calibration import parse_target
        >>> parse_target("certified:0.01@0.95").confidence
        0.95

    Source: Learn then Test (https://arxiv.org/abs/2110.01052), conformal risk control (https://arxiv.org/abs/2208.02814).
    """

    drop: float
    confidence: float = 0.95
    risk: str = "drop"
    procedure: str = "fixed-sequence"
    by: str | None = None
    bound: float | None = None

    example: ClassVar[str] = "0.01@0.95:risk=harm"
    named_by_words: ClassVar[frozenset[str]] = frozenset({"risk", "procedure", "by"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, low, high in (("drop", self.drop, 0.0, 1.0), ("confidence", self.confidence, 0.5, 1.0)):
            if not is_real(value, low, high) or value in (0, high):
                reach = f"from {low:g} up to, not including, {high:g}" if low else "between 0 and 1, both excluded"
                raise CalibrationError(f"{field} is {value!r}; expected a number {reach}.", field=field, value=value)
        check_choice(RISKS, error=CalibrationError, risk=self.risk)
        check_choice(PROCEDURES, error=CalibrationError, procedure=self.procedure)
        if self.bound is not None and (not is_real(self.bound, 0) or self.bound == 0):
            raise CalibrationError(
                f"bound is {shown(self.bound)}; expected a finite number above 0.", field="bound", value=self.bound
            )
        if self.by not in (None, "label", "group"):
            raise CalibrationError(f"by is {self.by!r}; expected None, 'label' or 'group'.", field="by", value=self.by)

    @property
    def promised_drop(self) -> float | None:
        return self.drop if self.risk == "drop" else None

    def pick(self, curve: Curve) -> int:
        raise CalibrationError("Certified settings are picked by other rows than those of the curve.", field="target")


def certify_setting(
    recipe: Recipe, target: Certified, trace: ExitTrace, groups: NDArray[np.int64] | None = None
) -> tuple[Setting, Promise]:
    """Make a path on some rows of a trace, certify on the others.

    Args:
        recipe: how settings are made; its `learning_share` of the rows makes the path and teaches the policy.
        target: what is promised.
        trace: of held-back rows.
        groups: number of each row's slice `[N]`, for `by="group"`.

    Raises:
        CalibrationError: where the certifying rows are too few for the promise even without a single loss.
    """
    if groups is not None and np.shape(groups) != (trace.num_rows,):
        raise CalibrationError(
            f"groups has shape {np.shape(groups)}; expected one number for each of {trace.num_rows} rows.", field="groups"
        )
    if groups is not None and np.asarray(groups).dtype.kind not in "biuUS":
        raise CalibrationError(
            f"groups are {np.asarray(groups).dtype}; expected a whole number or a name for each row's slice.", field="groups"
        )
    path_places, places = split_places(trace.num_rows, recipe.learning_share, recipe.seed)
    path_pool, pool = (Pool(trace.select(part), recipe.metric) for part in (path_places, places))
    path_rows, rows = path_pool.trace, pool.trace
    every_path_row = torch.arange(path_rows.num_rows)
    weak = () if recipe.keep_weak_exits else path_pool.weak_exits(every_path_row)
    policy = make_policy(recipe, path_rows, weak)
    path = _path(policy_curve(recipe, policy, path_pool, every_path_row))
    (path_scores, path_losses), (scores, losses) = (_looked_at(policy, part, recipe, target) for part in (path_pool, pool))
    parts = groups_of(target.by, rows, None if groups is None else np.asarray(groups)[places.numpy()])
    _check_enough(target, losses, parts)
    walk = _Walk(target, losses, scores, path, parts, (path_scores, path_losses.values))
    chosen = walk.last_certified()
    setting = Setting(
        policy=policy.with_thresholds(as_thresholds(path[chosen])),
        rows=rows,
        num_learning_rows=path_rows.num_rows,
        scan=pool.scan(policy),
        quality=pool.row_quality(policy),
        curve=curve_of(path, policy, pool, torch.arange(rows.num_rows)),
        weak=weak,
    )
    return setting, walk.promise(chosen, path_rows.num_rows)


def _looked_at(policy: ExitPolicy, pool: Pool, recipe: Recipe, target: Certified) -> tuple[Array, Losses]:
    """Scores `[N, E]`, -inf at muted exits, and losses of the rows of a pool."""
    scores, answers = pool.scan(policy)
    return scores.double().numpy(), losses_of(target.risk, pool.trace, answers, recipe.metric, target.bound)


def _path(curve: Curve) -> Array:
    """Settings `[K, E - 1]` from the full model to the cheapest, in the order of their cost on the rows that made them."""
    curve = thinned(curve)
    order = np.lexsort((-curve.quality, -curve.cost))
    _, first = np.unique(curve.thresholds[order], axis=0, return_index=True)
    return curve.thresholds[order][np.sort(first)]


class _Walk:
    """The certifying rows along a path.

    Args:
        target: what is promised.
        losses: of the rows at every exit.
        scores: `[N, E]`, -inf at muted exits.
        path: settings `[K, E - 1]`.
        parts: the rows of each group, which must all keep the promise.
        before: scores and losses `[M, E]` of the rows that made the path; tests are planned on them.
    """

    def __init__(
        self,
        target: Certified,
        losses: Losses,
        scores: Array,
        path: Array,
        parts: dict[str, NDArray[np.bool_]],
        before: tuple[Array, Array],
    ) -> None:
        self.target, self.losses, self.path, self.parts = target, losses, path, parts
        member = np.argmax(np.stack(list(parts.values())), axis=0)
        self.along = LossesAlong(losses, scores, path, member, len(parts))
        seen = Losses(before[1], losses.low, losses.high)
        self.before = LossesAlong(seen, before[0], path, np.zeros(len(before[1]), dtype=np.int64), 1)
        self.plans = self._plans()
        self.p_values = cache(self._p_values)

    def _plans(self) -> list[Plan]:
        """How each group is tested, at every setting alike: as suits the last one that it might certify."""
        level = _first_level(self.target)
        means = [tally.total / tally.counts.sum() for tally in (self.before.tallies(k)[0] for k in range(len(self.path)))]
        return [self._plan(means, int(part.sum()), level) for part in self.parts.values()]

    def _plan(self, means: list[float], num_rows: int, level: float) -> Plan:
        hoped = edge(num_rows, self.target.drop)
        decisive = max((place for place, mean in enumerate(means) if mean <= hoped), default=0)
        return self.before.losses.plan(self.before.tallies(decisive)[0], num_rows, self.target.drop, level)

    def at(self, place: int) -> Array:
        """Losses `[N]` at a setting."""
        return self.along.at(place)

    def _p_values(self, place: int) -> list[float]:
        tallies = self.along.tallies(place)
        return [self.losses.p_value(here, self.target.drop, plan) for here, plan in zip(tallies, self.plans, strict=True)]

    def p_value(self, place: int) -> float:
        """Of "some group's risk is above the limit": the largest of the groups' own, as one of their nulls is then true."""
        return max(self.p_values(place))

    def last_certified(self) -> int:
        """The last setting that holds; 0, the full model, always does."""
        if self.target.procedure == "crc":
            return self._last_controlled()
        test = fixed_sequence if self.target.procedure == "fixed-sequence" else fallback
        fallen = test(self.p_value, len(self.path), 1 - self.target.confidence)
        return max(fallen, default=0)

    def _last_controlled(self) -> int:
        """Conformal risk control: losses are made to grow along the path, row by row, as its theorem needs."""
        worst, chosen = np.full(len(self.losses.values), self.losses.low), 0
        for place in range(len(self.path)):
            worst = np.maximum(worst, self.at(place))
            for part in self.parts.values():
                if (worst[part].sum() + self.losses.high) / (part.sum() + 1) > self.target.drop:
                    return chosen
            chosen = place
        return chosen

    def promise(self, chosen: int, num_path_rows: int) -> Promise:
        """The evidence at the setting that was picked."""
        here, p_values = self.at(chosen), self.p_values(chosen)
        groups = tuple(
            GroupEvidence(name=name, num_rows=int(part.sum()), mean_loss=float(here[part].mean()), p_value=float(adjusted))
            for (name, part), adjusted in zip(self.parts.items(), holm(p_values), strict=True)
        )
        return Promise(
            risk=self.target.risk,
            limit=self.target.drop,
            confidence=self.target.confidence,
            procedure=self.target.procedure,
            num_rows=len(here),
            num_path_rows=num_path_rows,
            num_settings=len(self.path),
            mean_loss=float(here.mean()),
            p_value=max(p_values),
            groups=groups,
            rows_needed=self._rows_for(chosen + 1),
            bound=self.target.bound,
            date=datetime.date.today().isoformat(),
        )

    def _rows_for(self, place: int) -> int | None:
        """Certifying rows that would about certify a setting, at the rate of losses seen in its worst group."""
        if place >= len(self.path):
            return None
        p_values = self.p_values(place)
        part = list(self.parts.values())[int(np.argmax(p_values))]
        rate = max(0.0, float(self.at(place)[part].mean())) / self.losses.high
        needed = least_rows(
            lambda n: self.losses.p_value_at(rate, n, self.target.drop), 1 - self.target.confidence, most=10**7
        )
        return None if needed is None else math.ceil(needed * len(self.losses.values) / part.sum())


def _first_level(target: Certified) -> float:
    """What the first p-value of a walk is held against."""
    return (1 - target.confidence) / (STARTS if target.procedure == "fallback" else 1)


def _check_enough(target: Certified, losses: Losses, parts: dict[str, NDArray[np.bool_]]) -> None:
    """Refuse rows that could not certify anything, however few losses they showed."""
    smallest = min(parts, key=lambda name: parts[name].sum())
    have = int(parts[smallest].sum())
    if target.procedure == "crc":
        least = math.ceil(losses.high / target.drop - 1)
    else:
        least = least_rows(lambda n: losses.p_value_at(0.0, n, target.drop), _first_level(target)) or 10**9
    if have >= least:
        return
    rate = target.drop / 2
    likely = least_rows(lambda n: losses.p_value_at(rate, n, target.drop), 1 - target.confidence, most=10**7)
    whom = "" if len(parts) == 1 else f" of {smallest}"
    raise CalibrationError(
        f"{have} certifying rows{whom} cannot certify {target.drop:g} at {target.confidence:g}: {least} without a single "
        f"loss would be the least, and about {likely} at half the rate that is allowed. Collect more rows, ask for less, or "
        "run the full model.",
        field="trace",
        value=have,
    )
