"""Every policy on the same rows: numbers and thresholds from one half, figures from the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..calibration.choose import calibrate
from ..calibration.quality import find_metric
from ..calibration.replay import Replay, replay
from ..calibration.result import CalibrationResult
from ..calibration.search import Curve
from ..calibration.settings import Pool, curve_of
from ..calibration.targets import MaxDrop
from ..errors import DataError, EarlyExitError
from ..policies.base import POLICIES
from ..trace import ExitTrace

FEWEST_ROWS = 40
STATIC = "static"
PLAINEST = "confidence"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One policy.

    Attributes:
        name: as registered.
        chosen: what the choosing half gave for the permitted drop.
        judged: the same thresholds on the judging half.
        curve: all its settings on the judging half; cost is in mean layers.
    """

    name: str
    chosen: CalibrationResult
    judged: Replay
    curve: Curve


@dataclass(frozen=True, kw_only=True)
class PolicyComparison:
    """All policies that could be compared.

    Attributes:
        contenders: by name.
        left_out: name and reason of those that could not.
        judging: the rows all figures are from.
        judging_rows: their places in the whole trace, `[N]`.
        num_choosing: rows of the other half.
        max_drop: quality that could be lost on the choosing half.
        seed: of the split in halves.
    """

    contenders: dict[str, Contender]
    left_out: dict[str, str]
    judging: ExitTrace
    judging_rows: torch.Tensor
    num_choosing: int
    max_drop: float
    seed: int

    @property
    def best(self) -> Contender:
        """The policy with the fewest layers on the choosing half; chosen without a look at the judging half.

        Of several that do the same, `confidence` if it is among them: the plainest rule that does it.
        """
        rules = [contender for name, contender in self.contenders.items() if name != STATIC]
        return min(
            rules or self.contenders.values(),
            key=lambda one: (one.chosen.mean_cost, -one.chosen.quality, one.name != PLAINEST),
        )


def compare_policies(trace: ExitTrace, max_drop: float = 0.01, seed: int = 0) -> PolicyComparison:
    """Calibrate every registered policy on one half of the rows and judge it on the other.

    Args:
        trace: labelled rows the exits were not trained on.
        max_drop: quality that may be lost on the choosing half, 0 or more.
        seed: of the split.

    Raises:
        DataError: for fewer rows than two halves need, or if no policy can serve them.
        CalibrationError: for a trace tagged "train".
    """
    if trace.num_rows < FEWEST_ROWS:
        raise DataError(
            f"{trace.num_rows} rows cannot be split into rows that choose and rows that judge; "
            f"collect a trace of at least {FEWEST_ROWS}.",
            field="trace",
            value=trace.num_rows,
        )
    order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(seed))
    judging_rows = order[trace.num_rows // 2 :].sort().values
    choosing, judging = trace.select(order[: trace.num_rows // 2]), trace.select(judging_rows)
    metric, contenders, left_out = find_metric(None, trace.problem_type), {}, {}
    pool = Pool(replace(judging, cost=None), metric)
    for name in POLICIES.names():
        try:
            chosen = calibrate(choosing, name, MaxDrop(max_drop), seed=seed, metric=metric)
        except EarlyExitError as error:
            if trace.split == "train":
                raise
            left_out[name] = str(error)
            continue
        contenders[name] = Contender(
            name=name, chosen=chosen, judged=replay(chosen.policy, judging), curve=_curve_on(chosen, pool)
        )
    if not contenders:
        raise DataError(f"No policy can serve these rows: {next(iter(left_out.values()))}", field="trace")
    return PolicyComparison(
        contenders=contenders,
        left_out=left_out,
        judging=judging,
        judging_rows=judging_rows,
        num_choosing=choosing.num_rows,
        max_drop=max_drop,
        seed=seed,
    )


def _curve_on(chosen: CalibrationResult, pool: Pool) -> Curve:
    """The settings of a calibration's curve on other rows, each outcome once."""
    settings = (chosen.policy.thresholds, *(point[2] for point in chosen.curve))  # a curve leaves settings out
    vectors = np.array([[np.nan if value is None else value for value in thresholds] for thresholds in settings])
    curve = curve_of(vectors, chosen.policy, pool)
    _, first = np.unique(np.column_stack(curve[1:]), axis=0, return_index=True)
    kept = first[::-1]
    return Curve(vectors[kept], curve.cost[kept], curve.quality[kept], curve.standard_error[kept])
