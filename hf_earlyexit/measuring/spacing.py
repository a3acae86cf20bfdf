"""Exits every so many layers, by what layers and exits cost on this machine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration import CalibrationResult, Certified, LayerBudget, SpeedUp, Target, calibrate, parse_target, replay
from ..calibration.settings import between
from ..errors import CalibrationError, UsageError
from ..forms.speed import HINTS, THROUGHPUT, made_up_rows
from ..modeling.protocol import ExitClassifier, Wrapped
from ..policies import ExitPolicy
from ..registry import unknown_name
from ..serving.graph_walker import walker_for
from ..serving.scheduler import Scheduler
from ..serving.served import served_classifier
from ..timing import clock_for, seconds_in_turns
from ..trace import ExitTrace
from ..transfer import finished

FULL_BATCHES, SINGLE_ROWS, TURNS = 4, 8, 9  # what is timed: batches for many rows at once, or rows one by one


class StepCosts(NamedTuple):
    """What a row costs on a machine, in seconds: before its first layer, each layer, and each exit that it asks."""

    start: float
    layer: float
    exit: float


@dataclass(frozen=True, kw_only=True)
class SpacingTrial:
    """What was found for one spacing.

    Attributes:
        every: layers from exit to exit.
        quality, mean_layers: on the rows that chose the thresholds.
        mean_exits: exits that a row asks, in the mean, the one it leaves at among them.
        seconds: that a row is expected to take.
    """

    every: int
    quality: float
    mean_layers: float
    mean_exits: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """The spacing that is the fastest, and why.

    Attributes:
        every: layers from exit to exit.
        result: thresholds for it, for `set_exit_policy`.
        costs: measured on this machine.
        tried: all spacings, each with thresholds of its own.
    """

    every: int
    result: CalibrationResult
    costs: StepCosts
    tried: tuple[SpacingTrial, ...]

    @property
    def why(self) -> str:
        """The choice in a sentence."""
        layer, asking = 1e6 * self.costs.layer, 1e6 * self.costs.exit
        return f"an exit every {self.every} layers: a layer takes {layer:.0f} us of a row here, an exit {asking:.0f} us"


def space_exits(
    model: Wrapped,
    trace: ExitTrace,
    policy: str | ExitPolicy = "confidence",
    target: str | Target = "max-drop:0",
    *,
    performance_hint: str = THROUGHPUT,
    clock: Callable[[], float] | None = None,
    **options: Any,
) -> Spacing:
    """Calibrate with an exit every one, two, three layers and so on, and take the spacing that is the fastest here.

    Each exit that is asked costs its head, the policy's step and, on a GPU, a wait; each that is not makes rows run on to
    the next. Which weighs more depends on model, machine and load, so both are measured: made-up rows run through the model
    in full, half way, and with every exit asked, in turns.

    Args:
        model: that will serve; nothing is written on it.
        trace: of that model, on held-back rows.
        policy, options: as for `calibrate`, but for `every`.
        target: what the thresholds are for; one that says how much quality may be lost.
        performance_hint: "throughput" for many rows at once, "latency" for one at a time.
        clock: seconds; by default the processor's on a CPU with one thread, else the wall clock's.

    Returns:
        The spacing, its thresholds, and what was tried. Equal ones go to the closer exits.

    Raises:
        UsageError: for a target that fixes layers, for a promise, which holds for one choice of exits only (`calibrate` with
            `every` makes it), for a model with fewer than two exits or another trace, for `every`, which is looked for, and
            where layers cannot be told from noise.
        UnknownNameError: for another hint.
        CalibrationError: as `calibrate`.
    """
    if not isinstance(performance_hint, str) or performance_hint not in HINTS:
        raise unknown_name("performance hint", performance_hint, HINTS)
    wish = parse_target(target) if isinstance(target, str) else target
    if isinstance(wish, (Certified, SpeedUp, LayerBudget)):
        raise UsageError(
            f"target is {wish}; exits are spaced for a target that says how much quality may be lost, such as "
            "max-drop:0.01. For others pass every=... to calibrate.",
            field="target",
            value=target,
        )
    if "every" in options:
        raise UsageError("every is what is looked for; pass it to calibrate, or leave it out.", field="every")
    served: Any = served_classifier(model)
    if len(served.exit_layers) < 2:
        raise UsageError("The model has one exit; expected at least two to space.", field="model")
    if trace.exit_layers != served.exit_layers:
        raise UsageError(
            f"The trace has exits after layers {trace.exit_layers}, the model after {served.exit_layers}; collect a trace "
            "of this model.",
            field="trace",
        )
    quick = {**options, "folds": 0}
    closest, *others = spacings(trace.exit_layers)
    first = calibrate(trace, policy, wish, **quick)
    if not first.policy.may_leave:
        raise CalibrationError(f"No row leaves early for {wish}, so there is nothing to space: {first}", field="target")
    made, costs = {closest: first}, measure_step_costs(served, first.policy, performance_hint, clock)
    for every in others:
        try:
            made[every] = calibrate(trace, policy, wish, every=every, **quick)
        except CalibrationError:  # these exits cannot meet the target
            continue
    tried = tuple(_trial(every, result, trace, costs) for every, result in made.items())
    best = min(tried, key=lambda trial: trial.seconds).every
    return Spacing(every=best, result=calibrate(trace, policy, wish, every=best, **options), costs=costs, tried=tried)


def spacings(exit_layers: tuple[int, ...]) -> list[int]:
    """Numbers of layers from exit to exit that differ in the exits they leave, and leave more than the last; of those that
    leave the same exits the largest, and all exits first."""
    found = {between(exit_layers, every): every for every in range(1, exit_layers[-1] - exit_layers[0] + 1)}
    return [every for left_out, every in found.items() if len(left_out) < len(exit_layers) - 1]


def measure_step_costs(
    model: ExitClassifier, policy: ExitPolicy, performance_hint: str = THROUGHPUT, clock: Callable[[], float] | None = None
) -> StepCosts:
    """What layers and exits cost: three ways through the model in turns, whose medians tell three numbers.

    Args:
        model: a classifier with at least two exits.
        policy: whose step is timed.
        performance_hint, clock: as for `space_exits`.

    Raises:
        UsageError: where layers cannot be told from noise.
    """
    walker, exit_layers = walker_for(model), model.exit_layers
    budget = walker.best_batch_tokens
    careful = _patient(policy.with_thresholds(policy.highest_threshold))
    half = min(exit_layers[:-1], key=lambda layer: abs(2 * layer - exit_layers[-1]))
    asked = sum(map(careful.wants, range(len(exit_layers))))
    passed = {"full": (1, exit_layers[-1], 1), "half": (1, half, 1), "asked": (1, exit_layers[-1], asked)}
    ways = {
        "full": Scheduler(walker, None, budget),
        "half": Scheduler(walker, None, budget, half),
        "asked": Scheduler(walker, careful, budget),
    }
    (row,) = made_up_rows(model, 1)
    many = performance_hint == THROUGHPUT
    rows = made_up_rows(model, max(FULL_BATCHES * budget // walker.length(row), 1) if many else SINGLE_ROWS)
    batches = [rows] if many else [[row] for row in rows]

    def run(scheduler: Scheduler, batch: Any) -> None:
        scheduler.run(batch)
        finished(walker.device)

    seconds = seconds_in_turns(
        {way: [partial(run, scheduler, batch) for batch in batches] for way, scheduler in ways.items()},
        TURNS,
        warm_up=2,  # graphs are made the second time
        clock=clock or clock_for(walker.device),
    )
    medians = [float(seconds[way].median(0).values.sum()) / len(rows) for way in ways]
    start, layer, asking = map(float, np.linalg.solve([passed[way] for way in ways], medians))
    if layer <= 0:
        raise UsageError(
            f"The model in full takes no longer than its first {half} layers ({1000 * medians[0]:.3g} and "
            f"{1000 * medians[1]:.3g} ms a row): the machine is too busy to measure on, or the layers too small to matter.",
            field="model",
        )
    return StepCosts(max(start, 0.0), layer, max(asking, 0.0))


def _patient(policy: ExitPolicy) -> ExitPolicy:
    """The same rule, which lets nobody go before the last exit."""
    patient = copy.copy(policy)
    kind = type(type(policy).__name__, (type(policy),), {"leaves": _nobody})
    object.__setattr__(patient, "__class__", kind)
    return patient


def _nobody(policy: ExitPolicy, score: Tensor, exit_index: int) -> Tensor:
    return torch.zeros_like(score, dtype=torch.bool)


def _trial(every: int, result: CalibrationResult, trace: ExitTrace, costs: StepCosts) -> SpacingTrial:
    taken = replay(result.policy, trace).exit_layer
    asked = np.array([layer for index, layer in enumerate(trace.exit_layers) if result.policy.wants(index)])
    mean_exits = float((taken[:, None] >= asked).sum(1).mean())
    return SpacingTrial(
        every=every,
        quality=result.quality,
        mean_layers=float(taken.mean()),
        mean_exits=mean_exits,
        seconds=costs.start + costs.layer * float(taken.mean()) + costs.exit * mean_exits,
    )
