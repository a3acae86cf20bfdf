"""Thresholds for a model in 8 bits, chosen anew on its own logits, and what that changed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..calibration import CalibrationResult, calibrate, parse_target, replay
from ..calibration.targets import Target
from ..errors import UsageError
from ..modeling.protocol import ExitClassifier
from ..policies import ExitPolicy
from ..serving.collect import collect_trace
from ..trace import ExitTrace


@dataclass(frozen=True)
class PolicyFigures:
    """What a policy does on the calibration rows: quality, mean layers per row, thresholds."""

    quality: float
    full_quality: float
    mean_layers: float
    thresholds: tuple[float | None, ...]

    @classmethod
    def of(cls, policy: ExitPolicy, trace: ExitTrace) -> PolicyFigures:
        """Replay a policy."""
        done = replay(policy, trace)
        return cls(done.quality, done.full_quality, done.mean_layers, policy.thresholds)


@dataclass(frozen=True)
class Recalibration:
    """What 8 bits and new thresholds changed, on the rows that chose them.

    Attributes:
        result: the calibration of the model in 8 bits.
        before: the float32 model with its own thresholds; unchanged: the model in 8 bits with those; after: with new ones.
        num_rows: rows.
    """

    result: CalibrationResult
    before: PolicyFigures
    unchanged: PolicyFigures
    after: PolicyFigures
    num_rows: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        outcomes = {name: dataclasses.asdict(getattr(self, name)) for name in ("before", "unchanged", "after")}
        return {"result": self.result.to_dict(), "num_rows": self.num_rows, **outcomes}

    def __str__(self) -> str:
        lines = [f"{self.result.policy.name} for {self.result.target}, chosen anew on {self.num_rows} rows:"]
        named = (("float32", self.before), ("int8, old thresholds", self.unchanged), ("int8, new thresholds", self.after))
        for name, figures in named:
            thresholds = ", ".join("-" if value is None else f"{value:.4f}" for value in figures.thresholds)
            lines.append(
                f"{name:21s} quality {figures.quality:.4f} (all layers {figures.full_quality:.4f}), "
                f"mean layers {figures.mean_layers:.2f}, thresholds {thresholds}"
            )
        return "\n".join(lines)


def recalibrate(
    model: ExitClassifier, small: ExitClassifier, rows: Any, target: str | Target | None, **collecting: Any
) -> Recalibration:
    """Choose the policy of `model` anew for `small`.

    Args:
        model: float32, with a policy.
        small: the same model in 8 bits; it gets the new policy.
        rows: held-back rows with labels.
        target: what the thresholds are for; by default what the policy was calibrated for.
        collecting: options of `collect_trace`.

    Raises:
        UsageError: without a policy, or without a target where nothing tells one.
    """
    policy = model.exit_policy
    if policy is None:
        raise UsageError("The model has no exit policy; calibrate it and call set_exit_policy first.", field="model")
    if target is None:
        if model.config.exit_certificate is None:
            raise UsageError(
                "Nothing tells what the policy was calibrated for: pass target, such as 'max-drop:0.01'.", field="target"
            )
        target = parse_target(model.config.exit_certificate["target"])
    before, trace = collect_trace(model, rows, **collecting), collect_trace(small, rows, **collecting)
    several = len({threshold for threshold in policy.thresholds if threshold is not None}) > 1
    kept = not set(before.dead_exits()) <= set(policy.muted)  # weak exits were left open on purpose
    if policy.learns:
        result = calibrate(
            trace, policy.name, target, per_exit=several, options=_own_choices(policy, trace), keep_weak_exits=kept
        )
    else:
        result = calibrate(trace, policy, target, per_exit=several, keep_weak_exits=kept)
    small.set_exit_policy(result)
    outcomes = (PolicyFigures.of(policy, before), PolicyFigures.of(policy, trace), PolicyFigures.of(result.policy, trace))
    return Recalibration(result, *outcomes, num_rows=trace.num_rows)


def _own_choices(policy: ExitPolicy, trace: ExitTrace) -> dict[str, Any]:
    """Fields that a person chose, exits that were left out among them; not those that the policy learned."""
    frame = {field.name for field in dataclasses.fields(ExitPolicy)} | set(type(policy).learn(trace))
    own = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy) if field.name not in frame}
    return {**own, "muted": policy.muted}
