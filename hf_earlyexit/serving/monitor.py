"""Watches early answers in production: how often they differ from the full model's, and where rows leave."""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import InitVar, asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, UsageError
from ..files import read_json, write_json
from ..modeling.protocol import ExitModel
from ..problem_types import REGRESSION
from ..values import are_layers, check_flags, check_whole, is_real, unexpected
from .disagreement import disagreement_bounds

logger = logging.getLogger(__name__)
FORMAT = "hf_earlyexit.monitor/1"
LIMIT = 0.02
MOST_SHIFT = 0.2  # population stability index from which a shift counts as large, by custom
DISAGREEMENT, SHIFT = "disagreement", "shift"
OPTIONS = ("limit", "shadow", "confidence", "window", "fall_back", "seed")


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """What was noticed: "disagreement" or "shift", in words, and after how many rows."""

    kind: str
    message: str
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class MonitorState:
    """Counts, which add up over processes and restarts.

    Attributes:
        num_rows: that were answered; layers: sum of the layers that they ran.
        num_shadowed: of them, that the full model answered as well; num_different: whose early answer was another.
        exits: rows that left at each exit `[E]`; window: the same since the last comparison.
        alarms: so far.
    """

    num_rows: int = 0
    layers: int = 0
    num_shadowed: int = 0
    num_different: int = 0
    exits: tuple[int, ...] = ()
    window: tuple[int, ...] = ()
    alarms: tuple[Alarm, ...] = ()

    def __add__(self, other: MonitorState) -> MonitorState:
        return MonitorState(
            num_rows=self.num_rows + other.num_rows,
            layers=self.layers + other.layers,
            num_shadowed=self.num_shadowed + other.num_shadowed,
            num_different=self.num_different + other.num_different,
            exits=_added(self.exits, other.exits),
            window=_added(self.window, other.window),
            alarms=self.alarms + other.alarms,
        )


def _added(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    if not first or not second:
        return tuple(first or second)
    if len(first) != len(second):
        raise UsageError(
            f"States of {len(first)} and {len(second)} exits are of two models and do not add up.", field="state"
        )
    return tuple(a + b for a, b in zip(first, second, strict=True))


@dataclass
class Monitor:
    """Compares a random share of early answers with the full model's, and exit layers with those of the calibration.

    Hand it to `predict` or `stream` as `monitor=`. The bounds on the disagreement hold at every moment, however often they
    are looked at, for rows drawn alike. An alarm is raised when the lower bound passes `limit`, or when the exits that a
    window of rows leaves at differ much from the reference; it is logged, told to `on_alarm`, and kept in the state.

    Args:
        exit_layers: a model with exits, whose certificate tells limit and reference where it has one; or the layers
            (1-based) of its exits.
        limit: the largest share of differing answers that is fine, in (0, 1); by default what a promise of
            risk="disagreement" allows, or 0.02. Other promises are about lost quality, and answers may differ more often.
        shadow: share of rows that run on to the last layer after they have left, in (0, 1].
        confidence: that no alarm for disagreement is ever false, in [0.5, 1).
        reference: share of rows that left at each exit when thresholds were chosen `[E]`; by default the certificate's, or
            the first window's.
        window: rows between two comparisons of exits, at least 100.
        fall_back: after an alarm, `predict` and `stream` run every layer.
        on_alarm: called with each `Alarm`.
        seed: of the draw of shadowed rows.
        operating_point: of the model, whose certificate is read; `exit_policy` by default.

    Raises:
        UsageError: for numbers out of range.

    Source: the confidence sequence is Robbins' mixture for shares (Statistical methods related to the law of the iterated
        logarithm, 1970), with a uniform prior.
    """

    exit_layers: Any
    limit: float | None = None
    shadow: float = 0.01
    confidence: float = 0.99
    reference: tuple[float, ...] | None = None
    window: int = 1000
    fall_back: bool = False
    on_alarm: Callable[[Alarm], Any] | None = None
    seed: int = 0
    state: MonitorState = field(default_factory=MonitorState)
    operating_point: InitVar[str | None] = None

    def __post_init__(self, operating_point: str | None) -> None:
        if hasattr(self.exit_layers, "config"):
            self._read_certificate(self.exit_layers, operating_point)
        if not isinstance(self.exit_layers, (tuple, list)) or not are_layers(tuple(self.exit_layers)):
            raise unexpected("exit_layers", self.exit_layers, "a model with exits, or its layers, ascending")
        self.exit_layers = tuple(self.exit_layers)
        self.limit = LIMIT if self.limit is None else self.limit
        for name, value, low, high in (
            ("limit", self.limit, 0.0, 1.0),
            ("shadow", self.shadow, 0.0, 1.0),
            ("confidence", self.confidence, 0.5, 1.0),
        ):
            if not is_real(value, low, high) or value == 0 or (value == 1 and name != "shadow"):
                raise unexpected(name, value, "a share above 0 and below 1")
        check_whole(100, window=self.window)
        check_flags(fall_back=self.fall_back)
        shares = self.exit_layers if self.reference is None else self.reference
        if not isinstance(shares, (tuple, list)) or len(shares) != len(self.exit_layers):
            raise unexpected("reference", self.reference, f"a share for each of {len(self.exit_layers)} exits")
        if self.on_alarm is not None and not callable(self.on_alarm):
            raise unexpected("on_alarm", self.on_alarm, "a function of an alarm")
        check_whole(seed=self.seed)
        self._draws = np.random.default_rng(self.seed)
        self._lock = threading.Lock()

    def _read_certificate(self, model: ExitModel, operating_point: str | None) -> None:
        """Take exits from a model, and from its certificate, if it has one, what was not given."""
        model.policy_at(operating_point)  # refuse an unknown name now
        points = model.config.exit_point_certificates or {}
        certificate = model.config.exit_certificate if operating_point is None else points.get(operating_point)
        self.exit_layers = model.exit_layers
        if certificate is not None and self.reference is None:
            self.reference = tuple(certificate.get("exit_shares") or ()) or None
        if certificate is not None and self.limit is None:
            promise = certificate.get("promise") or {}
            self.limit = promise.get("limit") if promise.get("risk") == DISAGREEMENT else None

    def __repr__(self) -> str:
        return f"Monitor({self.state.num_rows} rows, {self.state.num_shadowed} shadowed, {len(self.state.alarms)} alarms)"

    @property
    def falls_back(self) -> bool:
        """Whether rows run through every layer from now on."""
        return self.fall_back and bool(self.state.alarms)

    def draw(self, count: int) -> list[int]:
        """Places of the rows, of the next `count`, that the full model answers as well."""
        with self._lock:
            return np.flatnonzero(self._draws.random(count) < self.shadow).tolist()

    def record(self, exit_layers: Sequence[int], same: Sequence[bool] = ()) -> None:
        """Add rows that were answered.

        Args:
            exit_layers: layer each row left after.
            same: for the shadowed ones of them, whether both answers are the same.

        Raises:
            UsageError: for a layer without an exit.
        """
        exits = {layer: place for place, layer in enumerate(self.exit_layers)}
        for layer in exit_layers:
            if layer not in exits:
                raise UsageError(
                    f"A row left after layer {layer}, where there is no exit.", field="exit_layers", value=layer
                )
        counts = np.bincount([exits[layer] for layer in exit_layers], minlength=len(exits)).astype(int)
        added = MonitorState(
            num_rows=len(exit_layers),
            layers=int(sum(exit_layers)),
            num_shadowed=len(same),
            num_different=len(same) - sum(map(bool, same)),
            exits=tuple(counts.tolist()),
            window=tuple(counts.tolist()),
        )
        with self._lock:
            self.state += added
            alarms = self._look()
        for alarm in alarms:
            logger.warning(alarm.message)
            if self.on_alarm is not None:
                self.on_alarm(alarm)

    def bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the share of differing answers, valid at every moment at the given confidence."""
        return disagreement_bounds(self.state.num_different, self.state.num_shadowed, 1 - self.confidence)

    def shift(self, counts: Sequence[int]) -> float:
        """Population stability index of exits' counts against the reference; 0 where there is none."""
        if self.reference is None or not sum(counts):
            return 0.0
        expected, observed = (
            np.asarray(part, dtype=float) + 0.5 for part in (np.array(self.reference) * sum(counts), counts)
        )
        expected, observed = expected / expected.sum(), observed / observed.sum()
        return float(((observed - expected) * np.log(observed / expected)).sum())

    def _look(self) -> list[Alarm]:
        """Alarms that the state gives for the first time."""
        state, alarms = self.state, []
        known = {alarm.kind for alarm in state.alarms}
        rate = state.num_different / max(state.num_shadowed, 1)  # the lower bound lies below it
        if (
            DISAGREEMENT not in known
            and self.limit is not None
            and rate > self.limit
            and (lower := self.bounds()[0]) > self.limit
        ):
            message = (
                f"Early answers differ from the full model's in {rate:.2%} of {state.num_shadowed} shadowed rows, with "
                f"{self.confidence:.1%} confidence in more than {lower:.2%}; the limit is {self.limit:.2%}. Calibrate again "
                "on rows of today."
            )
            alarms.append(Alarm(kind=DISAGREEMENT, message=message, num_rows=state.num_rows))
        if sum(state.window) >= self.window:
            if self.reference is None:
                self.reference = tuple(count / sum(state.window) for count in state.window)
            shift = self.shift(state.window)
            if SHIFT not in known and shift > MOST_SHIFT:
                message = (
                    f"The last {sum(state.window)} rows leave at other exits than when thresholds were chosen (population "
                    f"stability index {shift:.2f}; {MOST_SHIFT:g} counts as a large shift). Look whether the rows are of "
                    "another kind, and calibrate again on rows of today."
                )
                alarms.append(Alarm(kind=SHIFT, message=message, num_rows=state.num_rows))
            state = replace(state, window=(0,) * len(self.exit_layers))
        self.state = replace(state, alarms=(*state.alarms, *alarms))
        return alarms

    # --- as a file ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: options and state."""
        options = {name: getattr(self, name) for name in OPTIONS}
        reference = None if self.reference is None else list(self.reference)
        return {
            "format": FORMAT,
            "exit_layers": list(self.exit_layers),
            **options,
            "reference": reference,
            "state": json.loads(json.dumps(asdict(self.state))),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write options and state as one JSON file, whole or not at all."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | PathLike[str], on_alarm: Callable[[Alarm], Any] | None = None) -> Monitor:
        """Go on from what `save` wrote; shadowed rows are drawn anew.

        Raises:
            CheckpointError: for a file that is no monitor's.
        """
        try:
            values = dict(read_json(path))
            if values.pop("format") != FORMAT:
                raise ValueError("it has another format")
            state = dict(values.pop("state"))
            if odd := set(values) ^ {"exit_layers", "reference", *OPTIONS}:
                raise ValueError(f"it lacks, or has too much: {', '.join(sorted(odd))}")
            state["alarms"] = tuple(Alarm(**alarm) for alarm in state["alarms"])
            state |= {name: tuple(map(int, state[name])) for name in ("exits", "window")}
            for name in ("exit_layers", "reference"):
                values[name] = None if values[name] is None else tuple(values[name])
            monitor = cls(**values, on_alarm=on_alarm, state=MonitorState(**state))
            counts = (monitor.state.num_different, monitor.state.num_shadowed, monitor.state.num_rows)
            if not 0 <= counts[0] <= counts[1] <= counts[2] or sum(monitor.state.exits) != counts[2]:
                raise ValueError("its counts do not add up")
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{Path(path)} is no saved monitor ({error}).", path=path) from error
        monitor._draws = np.random.default_rng([monitor.seed, monitor.state.num_rows])
        return monitor

    def __str__(self) -> str:
        state, (lower, upper) = self.state, self.bounds()
        mean = state.layers / state.num_rows if state.num_rows else math.nan
        lines = [
            f"{state.num_rows} rows, {mean:.2f} of {self.exit_layers[-1]} layers on average",
            f"{state.num_shadowed} shadowed, {state.num_different} answered differently: {lower:.2%} to {upper:.2%} with "
            f"{self.confidence:.1%} confidence at every moment; the limit is {self.limit:.2%}",
            f"exits against the reference: population stability index {self.shift(state.exits):.3f}",
        ]
        return "\n".join(lines + [f"ALARM after {alarm.num_rows} rows: {alarm.message}" for alarm in state.alarms])


def check_monitor(monitor: Any) -> None:
    """Refuse what is neither a monitor nor `None`.

    Raises:
        UsageError: with what came.
    """
    if monitor is not None and not isinstance(monitor, Monitor):
        raise unexpected("monitor", monitor, "an `ee.Monitor`")


def require_classes(problem_type: str) -> None:
    """Refuse a model whose answers can hardly be the same.

    Raises:
        UsageError: for regression.
    """
    if problem_type == REGRESSION:
        raise UsageError("A monitor compares classes; values hardly ever agree exactly.", field="monitor")
