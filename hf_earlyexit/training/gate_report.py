"""What trained gates do: figures for the log, and a warning when they all say the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from ..calibration.replay import replay
from ..losses.base import row_losses
from ..losses.consistentee import ConsistentObjective
from ..policies.gate import GatePolicy
from ..trace import ExitTrace
from .hardness import HARDNESS

CROWD = 0.95  # a layer that takes more than this share of the rows
SHARE = re.compile(r"exit_(\d+)_share$")

logger = logging.get_logger(__name__)


def gate_metrics(trace: ExitTrace, objective: ConsistentObjective | None = None, measure: str = "none") -> dict[str, float]:
    """What rows would do that leave where their gates say one half or more.

    Args:
        trace: with gates.
        objective: adds the mean reward of where the rows leave.
        measure: of the rows' hardness, for the reward; a name of `HARDNESS`.

    Returns:
        `gate_quality` (accuracy for one label), `gate_layers` (mean), `exit_<layer>_share` for every exit, `gate_reward`.
    """
    done = replay(GatePolicy.half(trace.num_exits, problem_type=trace.problem_type), trace)
    metrics = {"gate_quality": done.quality, "gate_layers": done.mean_layers}
    metrics |= {f"exit_{exit.layer}_share": exit.share for exit in done.exits}
    if objective is not None:
        layers = torch.tensor(trace.exit_layers, dtype=torch.float32)
        losses = row_losses(trace.logits, trace.labels, trace.problem_type)
        rewards = objective.rewards(losses, HARDNESS.get(measure)(trace), layers)
        taken = torch.searchsorted(layers, torch.as_tensor(done.exit_layer, dtype=torch.float32))
        metrics["gate_reward"] = float(rewards.gather(1, taken[:, None]).mean())
    return metrics


def warn_of_collapse(logs: Sequence[dict[str, Any]]) -> int | None:
    """Warn if one layer took nearly all rows in the last two evaluations.

    Args:
        logs: of a run, in order; only entries with shares count.

    Returns:
        That layer, or `None`.
    """
    crowded = [_crowded_layer(log) for log in logs if any(SHARE.search(name) for name in log)][-2:]
    if len(crowded) < 2 or crowded[0] is None or crowded[0] != crowded[1]:
        return None
    logger.warning(
        f"The gates send more than {CROWD:.0%} of the rows out after layer {crowded[0]}, twice in a row: they have "
        "collapsed and no longer tell rows apart. Lower alpha if the layer is early, raise it if it is the last, or lower "
        "the gates' learning rate."
    )
    return crowded[0]


def _crowded_layer(log: dict[str, Any]) -> int | None:
    shares = {int(found[1]): value for name, value in log.items() if (found := SHARE.search(name))}
    layer = max(shares, key=lambda key: shares[key])
    return layer if shares[layer] > CROWD and len(shares) > 1 else None
