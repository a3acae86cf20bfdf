"""Thresholds with a promise that holds on rows nobody has seen.

A path of settings, from the full model to the cheapest, is fixed on some rows; other rows say how far along it the risk
stays below a limit. Because the certifying rows did not shape the path, and the walk ends at the first doubt, the chance
that the setting picked breaks the promise is at most one minus the confidence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import CalibrationError
from ..policies.base import ExitPolicy
from ..problem_types import SINGLE_LABEL
from ..trace import ExitTrace
from ..values import check_choice, is_real, shown
from .along import LossesAlong
from .evidence import least_rows
from .lists import Lists, ListsAlong, groups_of_lists, list_scores
from .promise import Promise
from .quality import Metric
from .risks import RISKS, Losses, groups_of, losses_of
from .search import Array, Curve
from .settings import (
    Pool,
    Recipe,
    Setting,
    as_thresholds,
    curve_of,
    make_policy,
    policy_curve,
    setting_of,
    split_places,
    thinned,
)
from .slices import Parts, check_groups
from .targets import TARGETS, Target
from .walk import Walk, first_level

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
        bound: for values, lists and texts, the largest difference in quality that counts; `drop` is then in units of it.

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
    recipe: Recipe,
    target: Certified,
    trace: ExitTrace,
    groups: ArrayLike | None = None,
    lists: Lists | None = None,
) -> tuple[Setting, Promise]:
    """Make a path on some rows of a trace, certify on the others.

    Args:
        recipe: how settings are made; its `learning_share` of the rows makes the path and teaches the policy.
        target: what is promised.
        trace: of held-back rows.
        groups: number or name of each row's slice `[N]`, for `by="group"`.
        lists: what rows are certified list by list, and by which metric.

    Raises:
        CalibrationError: where those that certify are too few for the promise even without a single loss.
    """
    slices = check_groups(groups, trace.num_rows)
    split = split_places if lists is None else lists.split
    path_places, places = split(trace.num_rows, recipe.learning_share, recipe.seed)
    pool = Pool(trace, recipe.metric)
    weak = () if recipe.keep_weak_exits or lists is not None else pool.weak_exits(path_places)
    policy = make_policy(recipe, pool.rows(path_places), weak)
    path = _path(policy_curve(recipe, policy, pool, path_places))
    here = None if slices is None else slices[places.numpy()]
    chosen, promise = _walked(target, lists, policy, path, pool, (path_places, places), here)
    policy = policy.with_thresholds(as_thresholds(path[chosen]))
    return setting_of(pool, policy, places, curve_of(path, policy, pool, places), weak), promise


def _walked(
    target: Certified,
    lists: Lists | None,
    policy: ExitPolicy,
    path: Array,
    pool: Pool,
    halves: tuple[Tensor, Tensor],
    groups: NDArray[Any] | None,
) -> tuple[int, Promise]:
    """The last certified setting of a path, and its evidence; places of the rows that made the path and of those that
    certify, groups of these."""
    if lists is not None:
        walk = _walk_of_lists(target, lists, policy, path, pool, halves, groups)
        num_before = lists.num_lists - walk.num_units
    else:
        seen, (scores, losses) = _looked_at(policy, pool, halves, target)
        parts = groups_of(target.by, pool.trace.labels[halves[1]], pool.trace.problem_type, groups)
        check_enough(target, losses, parts)
        measure = _measure(pool.metric, pool.trace)
        walk = walk_of_rows(target, losses, scores, path, parts, (seen[0], seen[1].values), measure)
        num_before = len(halves[0])
    chosen = walk.last_certified()
    return chosen, walk.promise(chosen, num_before)


def _looked_at(
    policy: ExitPolicy, pool: Pool, halves: tuple[Tensor, Tensor], target: Certified
) -> list[tuple[Array, Losses]]:
    """Scores `[n, E]`, -inf at muted exits, and losses of each half of the rows."""
    scores, answers = pool.scan(policy)
    losses = losses_of(target.risk, pool.trace, answers, pool.metric, target.bound)
    return [
        (scores[places].double().numpy(), Losses(losses.values[places.numpy()], losses.low, losses.high))
        for places in halves
    ]


def _measure(metric: Metric, trace: ExitTrace) -> str | None:
    """What quality is, in words; `None` where an answer is right or wrong."""
    if not trace.labelled:
        return "agreement with the full model"
    return None if trace.problem_type == SINGLE_LABEL and metric.is_row_quality else metric.title(trace.problem_type)


def _path(curve: Curve) -> Array:
    """Settings `[K, E - 1]` from the full model to the cheapest, in the order of their cost on the rows that made them."""
    curve = thinned(curve)
    vectors = curve.thresholds[np.lexsort((-curve.quality, -curve.cost))]
    _, first = np.unique(vectors, axis=0, return_index=True)
    return vectors[np.sort(first)]


def walk_of_rows(
    target: Certified,
    losses: Losses,
    scores: Array,
    path: Array,
    parts: Parts,
    before: tuple[Array, Array],
    measure: str | None = None,
) -> Walk:
    """Rows along a path of settings.

    Args:
        target: what is promised.
        losses: of the rows at every exit.
        scores: `[N, E]`, -inf at muted exits.
        path: settings `[K, E - 1]`.
        parts: the rows of each group, which must all keep the promise.
        before: scores and losses `[M, E]` of the rows that made the path.
        measure: what quality is, in words; `None` for right or wrong.
    """
    member = np.argmax(np.stack(list(parts.values())), axis=0)
    seen = Losses(before[1], losses.low, losses.high)
    alone = np.zeros(len(before[1]), dtype=np.int64)
    along = LossesAlong(losses, scores, path, member, len(parts))
    return Walk(target, along, LossesAlong(seen, before[0], path, alone, 1), parts, measure=measure)


def _walk_of_lists(
    target: Certified,
    lists: Lists,
    policy: ExitPolicy,
    path: Array,
    pool: Pool,
    halves: tuple[Tensor, Tensor],
    groups: NDArray[Any] | None,
) -> Walk:
    """Lists along a path of settings; places of the rows that made the path and of those that certify, groups of these."""
    if target.by not in (None, "group"):
        raise CalibrationError("Lists are certified together or by='group': each of them holds several labels.", field="by")
    if target.by == "group" and groups is None:
        raise CalibrationError("by is 'group'; pass the number of each row's slice as groups.", field="groups")
    alongs, (scores, answers) = [], pool.scan(policy)
    for places, slices in zip(halves, (None, groups), strict=True):
        ranking = list_scores(answers[places])
        ranking[:, -1] = list_scores(pool.trace.logits[places, -1:])[:, 0]  # whoever runs through all layers has this answer
        member = np.unique(lists.member[places.numpy()], return_inverse=True)[1].reshape(-1)
        parts = groups_of_lists(member, slices)
        labels = pool.trace.labels[places].double().reshape(len(member)).numpy()
        visible = scores[places].double().numpy()
        alongs.append(ListsAlong(target.risk, lists.quality, ranking, labels, member, visible, path, parts))
    check_enough(target, alongs[1].losses, alongs[1].parts, "lists")
    return Walk(target, alongs[1], alongs[0], alongs[1].parts, "lists", f"{lists.quality.name} of a list")


def check_enough(target: Certified, losses: Losses, parts: Parts, unit: str = "rows") -> None:
    """Refuse too few to certify anything, however few losses they showed."""
    smallest = min(parts, key=lambda name: parts[name].sum())
    have = int(parts[smallest].sum())
    if target.procedure == "crc":
        least = math.ceil(losses.high / target.drop - 1)
    else:
        least = least_rows(lambda n: losses.p_value_at(0.0, n, target.drop), first_level(target)) or 10**9
    if have >= least:
        return
    rate = target.drop / 2
    likely = least_rows(lambda n: losses.p_value_at(rate, n, target.drop), 1 - target.confidence, most=10**7)
    whom = "" if len(parts) == 1 else f" of {smallest}"
    raise CalibrationError(
        f"{have} certifying {unit}{whom} cannot certify {target.drop:g} at {target.confidence:g}: {least} without a single "
        f"loss would be the least, and about {likely} at half the rate that is allowed. Collect more {unit}, ask for less, "
        "or run the full model.",
        field="trace",
        value=have,
    )
