"""What evaluations of models that write say of every exit, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..losses import ObjectiveValue
from ..losses.base import row_losses
from ..problem_types import SINGLE_LABEL


def gate_value(outputs: Any) -> ObjectiveValue:
    """Binary cross entropy of every gate on whether its exit's first word is the last exit's, and their mean."""
    first = outputs.exit_logits.argmax(-1)
    right = (first[:, :-1] == first[:, -1:]).float()
    gates = outputs.exit_scalars["gate"].float()
    losses = functional.binary_cross_entropy_with_logits(gates, right, reduction="none").mean(0)
    return ObjectiveValue(losses.mean(), losses)


def row_sums(outputs: Any, labels: Tensor) -> Tensor:
    """Sums over the labelled tokens of each row, `[B, 1 + 3E]`, float32, with gates `[B, 2 + 4E]`.

    Number of tokens; right words, loss and words that are the last exit's of each exit; tokens that leave at each exit, and
    how many of all then say what the last exit says.
    """
    learned = labels != -100
    truth, logits = labels[learned], outputs.exit_logits
    words = logits.argmax(-1)  # [N, E]
    losses = torch.cat([row_losses(part[:, None], truth, SINGLE_LABEL) for part in logits.unbind(1)], 1)
    columns = [torch.ones_like(truth)[:, None], words == truth[:, None], losses, words == words[:, -1:]]
    if outputs.exit_scalars is not None:
        open_ = functional.pad(outputs.exit_scalars["gate"] >= 0, (0, 1), value=True)
        taken = open_.int().argmax(1, keepdim=True)
        columns += [functional.one_hot(taken[:, 0], logits.shape[1]), words.gather(1, taken) == words[:, -1:]]
    table = torch.cat([column.float() for column in columns], 1)
    rows = learned.nonzero()[:, 0]
    return table.new_zeros(len(labels), table.shape[1]).index_add_(0, rows, table)


def token_metrics(sums: np.ndarray, exit_layers: list[int]) -> dict[str, float]:
    """Metrics of an evaluation from `row_sums` over all rows, `[K]`."""
    count, exits = sums[0], len(exit_layers)
    accuracy, losses, agreement, shares, gates = np.split(sums[1:] / count, [exits, 2 * exits, 3 * exits, 4 * exits])
    metrics = {f"exit_{layer}_token_accuracy": float(value) for layer, value in zip(exit_layers, accuracy, strict=True)}
    metrics |= {f"exit_{layer}_loss": float(value) for layer, value in zip(exit_layers, losses, strict=True)}
    metrics |= {f"exit_{layer}_agreement": float(value) for layer, value in zip(exit_layers, agreement, strict=True)}
    if len(gates):
        metrics |= {f"exit_{layer}_share": float(value) for layer, value in zip(exit_layers, shares, strict=True)}
        metrics |= {"gate_agreement": float(gates[0]), "gate_layers": float(shares @ np.asarray(exit_layers))}
    return metrics
