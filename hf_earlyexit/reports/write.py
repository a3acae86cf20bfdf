"""One HTML file that tells what exits and policies are worth on a set of rows."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
from markupsafe import Markup

from ..calibration.by_class import to_show
from ..calibration.rare_classes import early_and_full_f1
from ..calibration.replay import Replay, replay
from ..errors import DataError
from ..images import embedded
from ..metrics import f1_name, memorized_layer, reliability, uneven_classes
from ..plots.figures import Mark, PlotLine, exit_quality_svg, exit_shares_svg, pareto_svg, reliability_svg
from ..plots.style import with_page_colours
from ..policies.base import ExitPolicy
from ..problem_types import SINGLE_LABEL, quality_name
from ..trace import ExitTrace
from .advice import ALWAYS, doubts, summary
from .compare import STATIC, Contender, PolicyComparison, compare_policies
from .mistakes import Mistakes, find_mistakes
from .page import write_page

THUMBNAIL = 96  # longest side of a picture, in pixels
SAME = 0.02  # of a curve's height: closer than that, two lines are one to the eye


def write_report(
    trace: ExitTrace,
    path: str | PathLike[str],
    *,
    policy: ExitPolicy | None = None,
    label_names: Sequence[str] | None = None,
    texts: Sequence[str | tuple[str, str]] | None = None,
    pictures: Sequence[Any] | None = None,
    title: str = "Early exit report",
    rows_name: str | None = None,
    max_drop: float = 0.01,
    seed: int = 0,
    most_mistakes: int = 20,
) -> PolicyComparison:
    """Compare all policies on the rows of a trace and write the outcome as one HTML file without scripts or links.

    Each policy learns its numbers and thresholds on one half of the rows; every figure is from the other half.

    Args:
        trace: labelled rows the exits were not trained on.
        path: file to write; an existing one is replaced.
        policy: the one in service; by default the best of the comparison, by its choosing half.
        label_names: one for each class.
        texts: the rows' texts, in the order of the trace, to show those that left early and wrong.
        pictures: the same for rows of pictures, in any form that `predict` takes; those that are shown are made small.
        title: of the page, such as the model's name.
        rows_name: where the rows come from; the trace's split by default.
        max_drop: quality that may be lost on the choosing half.
        seed: of the split in halves.
        most_mistakes: rows to show at most.

    Returns:
        The comparison whose figures the page shows.

    Raises:
        DataError: for too few rows, or texts, pictures or names that are not one for each.
        CalibrationError: for a trace of training rows.
        EarlyExitConfigError: for a policy of other exits.

    Examples:
        >>> import hf_earlyexit as ee
        >>> trace = ee.ExitTrace.load("held-back.safetensors")  # doctest: +SKIP
        >>> ee.reports.write_report(trace, "report.html", title="My classifier")  # doctest: +SKIP
    """
    _check(trace, policy, label_names, texts, pictures)
    comparison = compare_policies(trace, max_drop, seed)
    if policy is None:
        name, judged, rule = comparison.best.name, comparison.best.judged, comparison.best.chosen.policy
    else:
        name, judged, rule = f"{policy.name}, as served", replay(policy, comparison.judging), policy
    mistakes = find_mistakes(rule, comparison.judging, label_names, most_mistakes)
    write_page(
        "report.html",
        path,
        title=title,
        name=name,
        served=policy is not None,
        rows_name=rows_name or trace.split,
        comparison=comparison,
        judged=judged,
        measure=quality_name(trace.problem_type),
        depth=trace.exit_layers[-1],
        summary=summary(name, judged, comparison.judging),
        doubts=doubts(judged, comparison),
        always=ALWAYS,
        mistakes=mistakes,
        dead_layers=[comparison.judging.exit_layers[index] for index in comparison.judging.dead_exits()],
        classes=to_show(judged.classes),
        all_classes=len(judged.classes),
        class_names=label_names or [str(label) for label in range(trace.logits.shape[-1])],
        uneven=_rare_classes(rule, comparison.judging),
        texts=None if texts is None else [_text(texts[row]) for row in comparison.judging_rows.tolist()],
        pictures=None if pictures is None else _thumbnails(pictures, comparison, mistakes),
        places=comparison.judging_rows.tolist(),
        **_figures(name, judged, comparison),
    )
    return comparison


def _check(trace: ExitTrace, policy: ExitPolicy | None, label_names: Any, texts: Any, pictures: Any) -> None:
    for name, given in (("texts", texts), ("pictures", pictures)):
        if given is not None and len(given) != trace.num_rows:
            raise DataError(
                f"{len(given)} {name} for a trace of {trace.num_rows} rows; give the {name} the trace was collected on.",
                field=name,
                value=len(given),
            )
    classes = trace.logits.shape[-1]
    if label_names is not None and len(label_names) != classes:
        raise DataError(f"{len(label_names)} label names for {classes} classes; expected one for each.", field="label_names")
    if policy is not None and policy.num_exits != trace.num_exits:
        raise DataError(
            f"The policy has {policy.num_exits} exits, the trace {trace.num_exits}; they must be of one model.",
            field="policy",
        )


def _thumbnails(pictures: Sequence[Any], comparison: PolicyComparison, mistakes: Mistakes) -> dict[int, str]:
    """The pictures of rows that are shown, by place among the judging rows."""
    places = comparison.judging_rows.tolist()
    return {one.row: embedded(pictures[places[one.row]], THUMBNAIL) for one in mistakes.worst}


def _text(text: str | tuple[str, str]) -> str:
    return text if isinstance(text, str) else " | ".join(text)


def _figures(name: str, judged: Replay, comparison: PolicyComparison) -> dict[str, Any]:
    judging = comparison.judging
    measure, layers = quality_name(judging.problem_type), judging.exit_layers
    lines = _lines(comparison, name)
    mark = Mark(
        f"{name}, at the permitted drop" if name in comparison.contenders else name,
        judged.mean_layers,
        judged.quality,
        judged.standard_error,
    )
    full = Mark("full model", layers[-1], judged.full_quality)
    everyone = [report.quality for report in judged.exits]
    errors = (judging.quality.std(0, correction=0) / judging.num_rows**0.5).tolist()
    leavers = [report.quality_of_leavers for report in judged.exits]
    shares = [report.share for report in judged.exits]
    reliabilities, hardness = [], None
    if judging.problem_type == SINGLE_LABEL:
        needed = memorized_layer(judging, judging.dead_exits())
        hardness = _inline(
            exit_shares_svg({"rows": [float((needed == n).float().mean()) for n in layers]}, layers, "share of rows")
        )
        reliabilities = [reliability(judging.logits[:, index].float(), judging.labels) for index in range(judging.num_exits)]
    return {
        "pareto": _inline(pareto_svg(lines, [mark], full, measure)),
        "shares": _inline(exit_shares_svg({name: shares}, layers)),
        "hardness": hardness,
        "qualities": _inline(exit_quality_svg(layers, everyone, leavers, shares, measure, errors)),
        "reliabilities": [
            (layer, measured, _inline(reliability_svg(measured, layer)))
            for layer, measured in zip(layers, reliabilities, strict=False)
        ],
    }


def _lines(comparison: PolicyComparison, name: str) -> list[PlotLine]:
    """One line for each curve; policies whose curves nobody could tell apart share one."""
    depth = np.linspace(1, comparison.judging.exit_layers[-1], 60)
    groups: list[tuple[np.ndarray, list[Contender]]] = []
    for one in comparison.contenders.values():
        height = np.interp(depth, one.curve.cost[::-1], one.curve.quality[::-1])
        for known, members in groups:
            if one.name != STATIC and float(np.abs(known - height).max()) < SAME * max(float(np.ptp(known)), 1e-12):
                members.append(one)
                break
        else:
            groups.append((height, [one]))
    lines = []
    for _, members in groups:
        names = [one.name for one in members]
        look = "dots" if names == [STATIC] else "bold" if name in names else "plain"
        shown = next((one for one in members if one.name == name), members[0])
        layers, quality, error = (part[::-1].tolist() for part in shown.curve[1:])
        lines.append(PlotLine(", ".join(names), layers, quality, look, error))
    return lines


def _rare_classes(policy: ExitPolicy, trace: ExitTrace) -> tuple[str, float, float] | None:
    """Name of F1, and F1 of the early answers and of the full model, where classes are uneven."""
    if not uneven_classes(trace.labels, trace.problem_type, trace.logits.shape[-1]):
        return None
    return f1_name(trace.problem_type), *early_and_full_f1(policy, trace)


def _inline(svg: str) -> Markup:
    return Markup(with_page_colours(svg))
