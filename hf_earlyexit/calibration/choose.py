"""Choose thresholds on held-back rows, with no model in sight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from importlib.metadata import version
from typing import Any

from numpy.typing import ArrayLike

from ..errors import CalibrationError
from ..policies.base import ExitPolicy
from ..trace import ExitTrace
from ..values import check_flags, check_whole, is_real, shown, unexpected
from .certify import Certified, certify_setting
from .copies import check_not_learned_from
from .cross_fit import Expectation, expect
from .lists import NAMED, Lists
from .notes import on_expectation, on_rare_classes, on_ready_policy, on_rows, on_setting, on_target
from .promise import Promise
from .quality import Metric, default_metric, find_metric
from .quality_metrics import Accuracy
from .replay import Outcome, replay_scanned
from .result import CalibrationResult
from .settings import Pool, Recipe, Setting, as_thresholds, between, check_options, choose_setting
from .stored import SEEDS
from .targets import Target, parse_target


def calibrate(
    trace: ExitTrace,
    policy: str | ExitPolicy = "confidence",
    target: str | Target = "max-drop:0",
    *,
    metric: str | Metric | Callable[[Any, Any], float] | None = None,
    per_exit: bool | None = None,
    options: dict[str, Any] | None = None,
    keep_weak_exits: bool = False,
    min_leavers: int = 10,
    learning_share: float = 0.2,
    folds: int | None = None,
    groups: ArrayLike | None = None,
    lists: ArrayLike | None = None,
    learned_from: ExitTrace | None = None,
    every: int = 1,
    seed: int = 0,
) -> CalibrationResult:
    """Choose a policy's thresholds so that a target is met on the rows of a trace.

    Exits that are no better than always giving the most frequent answer are closed and muted: they would agree with each
    other without knowing anything. Policies that learn numbers of their own do so on other rows than those that choose
    the thresholds. Candidate thresholds are all observed scores; the sweep over them is exact. The whole choice is repeated
    fold by fold, and `result.expected` says what it was worth on the rows left out.

    Args:
        trace: rows the exits were not trained on, from `collect_trace`.
        policy: a registered name, made for this trace, or a policy whose own numbers are kept.
        target: `MaxDrop`, `SpeedUp`, `LayerBudget`, `FinalLayerError`, `Certified`, or words such as "max-drop:0.01" and
            "certified:0.01@0.95".
        metric: the unit of quality: a name such as "accuracy", "f1:1", "f1-macro", "matthews", "balanced-accuracy",
            "recall-at-precision:0.9", "mae" or "spearman", or a function of (answers, labels), bigger being better. By
            default accuracy, macro F1 where the classes of one label are uneven, and minus the squared error for values.
        per_exit: one threshold per exit instead of one for all; by default as the target prefers.
        options: fields of the policy or of its `learn`, such as `{"layer_cost": 0.4}`; with a name only.
        keep_weak_exits: leave exits open that are no better than the most frequent answer.
        min_leavers: with `per_exit`, the fewest rows an exit must take to be opened.
        learning_share: share of the rows a policy learns its own numbers from, in `(0, 1)`; for `Certified`, of those that
            make the path of settings.
        folds: most repetitions for `expected`, each judged on at least 50 rows; 0 for none. By default 10, and 5 for more
            than 10,000 rows.
        groups: for `Certified(by="group")`, the number or name of each row's slice `[N]`.
        lists: for `Certified`, the number or name of each row's list `[N]`, such as its query: the promise is about lists,
            judged by `metric`, which is then "ndcg", "ndcg:10", "mrr" or a function of a list's scores and labels, with
            the target's `bound`. Rows are ranked by their value, or by how far label 1 is ahead of label 0.
        learned_from: the rows that a ready policy learned its numbers from; a trace that holds any is refused.
        every: ask an exit only every so many layers, counted from the last; the exits between are closed and muted. Each
            exit that is asked costs time: `measuring.space_exits` finds the number that is the fastest on a machine.
        seed: of the split between learning rows and threshold rows, and of the folds.

    Returns:
        The policy with thresholds, what they did on the rows that chose them, and what to expect of others.

    Raises:
        CalibrationError: for an empty or train-tagged trace, a target that cannot be met, or too few rows to certify.
        UsageError: for arguments of another kind.
        UnknownNameError: for an unknown policy, target or metric.
        PolicyError: for options the policy refuses, or a problem type it cannot serve.
    """
    check_flags(per_exit=per_exit, keep_weak_exits=keep_weak_exits)
    check_whole(min_leavers=min_leavers)
    if folds is not None:
        check_whole(folds=folds)
    check_whole(-SEEDS, SEEDS - 1, seed=seed)
    check_whole(1, every=every)
    target = parse_target(target) if isinstance(target, str) else target
    _check(trace, target)
    if trace.num_exits > 1 and len(between(trace.exit_layers, every)) == trace.num_exits - 1:
        raise CalibrationError(
            f"every is {every}, and no exit but the last stands {every} layers or a multiple before the last: the exits are "
            f"after layers {', '.join(map(str, trace.exit_layers))}.",
            field="every",
            value=every,
        )
    if not is_real(learning_share, 0, 1) or learning_share in (0, 1):
        raise CalibrationError(
            f"learning_share is {shown(learning_share)}; expected a share between 0 and 1.",
            field="learning_share",
            value=learning_share,
        )
    if groups is not None and not (isinstance(target, Certified) and target.by == "group"):
        raise CalibrationError(f"groups go with Certified(by='group'); {target} would not see them.", field="groups")
    per_exit = target.per_exit if per_exit is None else per_exit
    if not per_exit and not target.serves_single_threshold:
        raise CalibrationError(f"{target} sets each exit's own threshold; use per_exit=True.", field="per_exit")
    whole = None if lists is None else _lists(lists, trace, target, metric)
    if whole is None and isinstance(metric, str) and metric.partition(":")[0] in NAMED:
        raise CalibrationError(f"{metric} judges lists; pass the list of each row as lists, with Certified.", field="metric")
    chosen_metric = find_metric(metric if whole is None else None, trace.problem_type, default_metric(trace))
    check_not_learned_from(trace, learned_from)
    named = metric if whole is None else whole.quality.name
    notes = on_rows(trace, named, chosen_metric, isinstance(target, Certified))
    if isinstance(target, Certified):
        notes += on_ready_policy(policy, learned_from)
    if isinstance(target, Certified) and (metric is None or whole is not None) and not chosen_metric.is_mean:
        chosen_metric = Accuracy()
    recipe = Recipe(
        policy=policy,
        target=target,
        metric=chosen_metric,
        per_exit=per_exit,
        options=check_options(policy, options),
        keep_weak_exits=keep_weak_exits,
        min_leavers=min_leavers,
        learning_share=learning_share,
        seed=seed,
        every=every,
    )
    if isinstance(target, Certified):
        setting, promise = certify_setting(recipe, target, trace, groups, whole)
        return _result(recipe, setting, notes, None, promise)
    pool = Pool(trace, recipe.metric)
    setting = choose_setting(recipe, pool)
    return _result(recipe, setting, notes, expect(recipe, pool, folds))


def _check(trace: ExitTrace, target: Target) -> None:
    if not isinstance(trace, ExitTrace):
        raise unexpected("trace", trace, "an ExitTrace, from `collect_trace`")
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


def _lists(lists: ArrayLike, trace: ExitTrace, target: Target, metric: Any) -> Lists:
    if not isinstance(target, Certified):
        raise CalibrationError(f"lists go with Certified; {target} would not see them.", field="lists")
    return Lists.of(lists, trace.num_rows, "ndcg" if metric is None else metric, target.bound)


def _result(
    recipe: Recipe,
    setting: Setting,
    notes: list[str],
    expected: Expectation | None = None,
    promise: Promise | None = None,
) -> CalibrationResult:
    policy, trace = setting.policy, setting.trace
    done = replay_scanned(policy, trace, setting.scan, setting.quality, recipe.metric, setting.places)
    outcome = {field.name: getattr(done, field.name) for field in fields(Outcome)}
    curve = setting.curve
    result = CalibrationResult(
        **outcome,
        policy=policy,
        target=str(recipe.target),
        metric=recipe.metric.name,
        curve=tuple(
            (float(cost), float(quality), as_thresholds(vector))
            for cost, quality, vector in zip(curve.cost, curve.quality, curve.thresholds[:], strict=True)
        ),
        num_rows=setting.num_rows,
        num_learning_rows=trace.num_rows - setting.num_rows,
        seed=recipe.seed,
        split=trace.split,
        dtype=str(trace.meta.get("dtype", "unknown")),
        fingerprint=trace.fingerprint,
        versions={name: version(name) for name in ("hf_earlyexit", "torch")},
        expected=expected,
        promise=promise,
    )
    notes += on_target(recipe.target, setting) + on_setting(setting) + on_rare_classes(setting, recipe.metric)
    return replace(result, notes=(*notes, *on_expectation(recipe.target, result)))
