"""What trained gates do: figures for the log, and warnings when they no longer tell rows apart."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging

from ..calibration.replay import replay
from ..losses.consistentee import ConsistentObjective
from ..policies.gate import GatePolicy
from ..problem_types import SINGLE_LABEL
from ..trace import ExitTrace
from .hardness import HARDNESS
from .outcomes import Outcomes

CROWD = 0.95  # a layer that takes more than this share of the rows
CERTAIN = 1e-3  # a gate this close to 0 or 1 hardly learns any more
SHARE = re.compile(r"exit_(\d+)_share$")

logger = logging.get_logger(__name__)


def gate_metrics(trace: ExitTrace, objective: ConsistentObjective | None = None, measure: str = "none") -> dict[str, float]:
    """What rows would do that leave where their gates say one half or more.

    Args:
        trace: with gates.
        objective: adds the mean reward of where the rows leave.
        measure: of the rows' hardness, for the reward; a name of `HARDNESS`.

    Returns:
        `gate_quality` (accuracy for one label), `gate_layers` (mean), `exit_<layer>_share` for every exit, `gate_certain`
        (share of gates closer to 0 or 1 than 0.001), `gate_reward`; for one label also `gate_stuck_classes`: how many
        classes have no row that leaves early.
    """
    done = replay(GatePolicy.half(trace.num_exits, problem_type=trace.problem_type), trace)
    taken = torch.searchsorted(torch.tensor(trace.exit_layers), torch.as_tensor(done.exit_layer))
    leave_logits = trace.scalars.get("gate", torch.zeros(trace.num_rows, 0))
    metrics = {"gate_quality": done.quality, **_places(taken, leave_logits, trace.exit_layers)}
    if trace.problem_type == SINGLE_LABEL:
        early = torch.as_tensor(done.exit_layer) < trace.exit_layers[-1]
        labels = trace.labels.reshape(-1)
        metrics["gate_stuck_classes"] = float(len(set(labels.tolist()) - set(labels[early].tolist())))
    if objective is not None:
        metrics["gate_reward"] = _reward(taken, Outcomes.of(trace), objective, measure)
    return metrics


def token_gate_metrics(
    leave_logits: Tensor, outcomes: Outcomes, objective: ConsistentObjective, measure: str
) -> dict[str, float]:
    """As `gate_metrics`, for tokens; quality is the share of right words.

    Args:
        leave_logits: of the gates `[N, E - 1]`.
        outcomes: of the same tokens.
        objective, measure: as in `gate_metrics`.
    """
    taken = functional.pad(leave_logits >= 0, (0, 1), value=True).int().argmax(1)
    quality = float(outcomes.right.float().gather(1, taken[:, None]).mean())
    places = _places(taken, leave_logits, outcomes.exit_layers)
    return {"gate_quality": quality, **places, "gate_reward": _reward(taken, outcomes, objective, measure)}


def _places(taken: Tensor, leave_logits: Tensor, exit_layers: Sequence[int]) -> dict[str, float]:
    """Where rows leave, from exit indices `[N]`, and how certain gates are."""
    share = torch.bincount(taken, minlength=len(exit_layers)).double() / len(taken)
    metrics = {"gate_layers": float(share @ torch.tensor(exit_layers, dtype=torch.float64))}
    metrics |= {f"exit_{layer}_share": part for layer, part in zip(exit_layers, share.tolist(), strict=True)}
    chance = leave_logits.float().sigmoid()
    metrics["gate_certain"] = float(((chance < CERTAIN) | (chance > 1 - CERTAIN)).float().mean()) if chance.numel() else 0.0
    return metrics


def _reward(taken: Tensor, outcomes: Outcomes, objective: ConsistentObjective, measure: str) -> float:
    layers = torch.tensor(outcomes.exit_layers, dtype=torch.float32)
    rewards = objective.rewards(outcomes.losses, HARDNESS.get(measure)(outcomes), layers)
    return float(rewards.gather(1, taken[:, None]).mean())


def warn_of_trouble(logs: Sequence[dict[str, Any]]) -> list[str]:
    """Warn of what is wrong in both of the last two evaluations.

    That is a layer that took nearly all rows, gates that are certain of nearly everything, or classes of which no row leaves
    early.

    Args:
        logs: of a run, in order; only entries with shares count.

    Returns:
        The warnings, as they were logged.
    """
    last = [log for log in logs if any(SHARE.search(name) for name in log)][-2:]
    if len(last) < 2:
        return []
    warnings = []
    crowded = {_crowded_layer(log) for log in last}
    collapsed = len(crowded) == 1 and None not in crowded
    if collapsed:
        warnings.append(
            f"The gates send more than {CROWD:.0%} of the rows out after layer {crowded.pop()}, twice in a row: they have "
            "collapsed and no longer tell rows apart. Lower alpha if the layer is early, raise it if it is the last, or "
            "lower the gates' learning rate."
        )
    if all(log.get("gate_certain", 0.0) > CROWD for log in last):
        warnings.append(
            f"More than {CROWD:.0%} of the gates are within {CERTAIN:g} of 0 or 1, twice in a row: they are saturated, "
            "learn hardly any more, and thresholds other than one half do little. Train them for fewer epochs or at a "
            "lower rate, or on rows held back (gate_dataset)."
        )
    stuck = min(int(log.get("gate_stuck_classes", 0)) for log in last)
    if stuck and not collapsed:
        warnings.append(
            f"No row of {stuck} {'class leaves' if stuck == 1 else 'classes leaves'} early, twice in a row. Look at the "
            "quality of the exits on these classes: where early exits never answer them rightly, gates cannot help."
        )
    for text in warnings:
        logger.warning(text)
    return warnings


def _crowded_layer(log: dict[str, Any]) -> int | None:
    shares = {int(match[1]): value for name, value in log.items() if (match := SHARE.search(name))}
    layer = max(shares, key=lambda key: shares[key])
    return layer if shares[layer] > CROWD and len(shares) > 1 else None
