"""What the figures mean, in plain sentences, and when early exit is the wrong tool."""

from __future__ import annotations

import math

from ..calibration.replay import Replay
from ..problem_types import quality_name
from ..trace import ExitTrace
from .compare import STATIC, PolicyComparison

HARDLY_ANYTHING = 0.1  # share of layers saved below which the machinery is not worth its keep


def summary(name: str, judged: Replay, trace: ExitTrace) -> list[str]:
    """What the policy `name` did on the judging rows."""
    measure, depth = quality_name(trace.problem_type), trace.exit_layers[-1]
    early = 1 - judged.exits[-1].share
    return [
        f"With {name}, {early:.0%} of the rows left before the last layer; a row took {judged.mean_layers:.2f} of {depth} "
        f"layers on average, a layer speed-up of {judged.layer_speed_up:.2f}x.",
        f"The early answers have {measure} {judged.quality:.4f}, the full model {judged.full_quality:.4f}: a difference of "
        f"{judged.quality - judged.full_quality:+.4f}, with a standard error of {judged.standard_error:.4f}.",
    ]


def doubts(judged: Replay, comparison: PolicyComparison) -> list[str]:
    """Reasons, found in these figures, not to use early exit or not to believe the figures; empty if there are none."""
    trace, sentences = comparison.judging, []
    measure, depth = quality_name(trace.problem_type), trace.exit_layers[-1]
    if 1 - judged.mean_layers / depth < HARDLY_ANYTHING:
        sentences.append(
            f"Early exit saves hardly anything here: {judged.mean_layers:.2f} of {depth} layers are still run. The exits do "
            "not yet know enough; train them longer, allow a larger drop, or use the full model."
        )
    static = comparison.contenders.get(STATIC)
    if static is not None and static.judged.mean_layers < depth and static.judged.mean_layers <= judged.mean_layers:
        sentences.append(
            f"Cutting the model off after layer {static.judged.mean_layers:.0f} for every row costs no more layers, with "
            f"{measure} {static.judged.quality:.4f} against {judged.quality:.4f}. A shorter or smaller model may be the "
            "simpler tool."
        )
    best = max(judged.exits, key=lambda report: report.quality)
    if best.quality > judged.full_quality + judged.standard_error and best.layer < depth:
        sentences.append(
            f"The exit after layer {best.layer} alone has {measure} {best.quality:.4f}, more than the last one's "
            f"{judged.full_quality:.4f}: the layers after it do not help on these rows."
        )
    if judged.quality + judged.standard_error < judged.full_quality - comparison.max_drop:
        sentences.append(
            f"More was lost than the permitted {comparison.max_drop:g}: thresholds that met it on the rows that chose them "
            f"did not on these {trace.num_rows}. Choose them on more rows, or keep a standard error in reserve."
        )
    if judged.standard_error > max(comparison.max_drop, 1e-12) / 2 and comparison.max_drop > 0:
        needed = math.ceil(trace.num_rows * (2 * judged.standard_error / comparison.max_drop) ** 2)
        sentences.append(
            f"{trace.num_rows} rows are too few to tell a drop of {comparison.max_drop:g} from chance; judging would take "
            f"about {needed:,}."
        )
    return sentences


ALWAYS = (
    "Layers are not seconds. On a GPU with small batches, where launching kernels takes longer than running them, leaving "
    "early may save no time at all; measure your own load with `hf-earlyexit evaluate --time true`.",
    "If a smaller model is accurate enough for you, it is faster for every row and has nothing to calibrate.",
    "Thresholds hold for rows like those that chose them. When the texts change, collect a new trace and calibrate again.",
)
