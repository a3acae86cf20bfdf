"""What a policy does on the rows of a trace, without running a model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import CalibrationError, UsageError
from ..policies.base import ExitPolicy
from ..policies.scanning import Scan
from ..problem_types import row_quality
from ..trace import ExitTrace
from .by_class import ClassReport, answers_at, class_reports
from .parts import Places, left_with, some
from .quality import Metric, compare_rows, find_metric


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """What one exit did.

    Attributes:
        layer: its layer, 1-based.
        threshold: `None` if closed.
        share: share of all rows that left here.
        quality: of this exit on all rows.
        quality_of_leavers: of this exit on the rows that left here; `None` if nobody did.
        last_quality_of_leavers: of the last exit on the same rows.
    """

    layer: int
    threshold: float | None
    share: float
    quality: float
    quality_of_leavers: float | None
    last_quality_of_leavers: float | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a policy did on some rows.

    Attributes:
        quality: of the early answers; full_quality: of the last exit; both by the metric.
        standard_error: of the difference of the two.
        mean_layers, mean_cost: per row; layer_speed_up: number of layers over mean layers.
        exits: one report per exit.
        classes: one report per class, of the early answers; none for values.
    """

    quality: float
    full_quality: float
    standard_error: float
    mean_layers: float
    mean_cost: float
    layer_speed_up: float
    exits: tuple[ExitReport, ...]
    classes: tuple[ClassReport, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Replay(Outcome):
    """A policy's outcome on N rows, and where each of them left.

    Attributes:
        exit_layer: layer each row left after, `[N]`.
    """

    exit_layer: np.ndarray


def replay(policy: ExitPolicy, trace: ExitTrace, metric: str | Metric | None = None) -> Replay:
    """Let every row of a trace leave where the policy says.

    Serving gives the same layers: the engine steps the very `update` that is folded here.

    Args:
        policy: with thresholds for the trace's exits.
        trace: labelled rows; for figures to report, rows that neither trained nor chose anything.
        metric: the unit of `quality`, as in `calibrate`; accuracy by default, minus the squared error for values.

    Returns:
        Quality, layers and what each exit did.

    Raises:
        CalibrationError: for no rows, or a policy of other exits.
        UsageError: for what is no policy or no trace.
    """
    if not isinstance(policy, ExitPolicy) or not isinstance(trace, ExitTrace):
        raise UsageError(
            f"replay was given a {type(policy).__name__} and a {type(trace).__name__}; expected a policy, then a trace.",
            field="policy",
        )
    if policy.num_exits != trace.num_exits or trace.num_rows == 0:
        raise CalibrationError(
            f"The policy has {policy.num_exits} exits, the trace {trace.num_exits} and {trace.num_rows} rows; "
            "expected the exits of one model, and rows.",
            field="trace",
        )
    metric, scan = find_metric(metric, trace.problem_type), policy.scan(trace)
    return replay_scanned(policy, trace, scan, row_quality(scan.answers, trace.labels, trace.problem_type), metric)


def replay_scanned(
    policy: ExitPolicy, trace: ExitTrace, scan: Scan, exit_quality: Tensor, metric: Metric, places: Places = None
) -> Replay:
    """`replay` of some rows, from what the policy makes of all, and the quality of its answers at each exit `[N, E]`."""
    exits, full_logits = policy.decide(some(scan.scores, places)), trace.logits[:, -1]
    labels, problem_type = some(trace.labels, places), trace.problem_type
    exit_quality = some(exit_quality, places)
    if scan.answers is trace.logits:
        full_quality = exit_quality[:, -1].contiguous()
    else:
        full_quality = row_quality(some(full_logits, places), labels, problem_type)
    if metric.is_row_quality:
        compared = compare_rows(left_with(exit_quality, None, exits), full_quality)
    else:
        given = left_with(scan.answers, places, exits)
        compared = metric.compare(given, some(full_logits, places), labels, problem_type)
        del given
    early = answers_at(scan.answers, places, exits, problem_type)
    last = answers_at(trace.logits, places, torch.full_like(exits, trace.num_exits - 1), problem_type)
    quality, full, taken = exit_quality.numpy(), full_quality.numpy(), exits.numpy()
    layers = np.asarray(trace.exit_layers)[taken]
    return Replay(
        quality=compared.quality,
        full_quality=compared.full_quality,
        standard_error=compared.standard_error,
        mean_layers=float(layers.mean()),
        mean_cost=float(np.asarray(trace.costs)[taken].mean()),
        layer_speed_up=float(trace.exit_layers[-1] / layers.mean()),
        exits=tuple(_exit_report(policy, trace, quality, full, taken, index) for index in range(trace.num_exits)),
        classes=class_reports(early, last, labels, trace.logits.shape[-1], problem_type),
        exit_layer=layers,
    )


def _exit_report(
    policy: ExitPolicy, trace: ExitTrace, quality: np.ndarray, full: np.ndarray, taken: np.ndarray, index: int
) -> ExitReport:
    here = taken == index
    return ExitReport(
        layer=trace.exit_layers[index],
        threshold=policy.thresholds[index] if index < trace.num_exits - 1 else None,
        share=float(here.mean()),
        quality=float(quality[:, index].mean()),
        quality_of_leavers=float(quality[here, index].mean()) if here.any() else None,
        last_quality_of_leavers=float(full[here].mean()) if here.any() else None,
    )
