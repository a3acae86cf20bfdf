"""Rows that stand twice, or in two traces: known by what the first and the last exit said of them, to the bit."""

from __future__ import annotations

import torch

from ..errors import CalibrationError
from ..policies.scanning import SCANNED
from ..trace import ExitTrace
from ..values import unexpected


def marks(trace: ExitTrace, dtype: torch.dtype | None = None) -> list[int]:
    """A number for each row, the same for rows with the same logits at the first and the last exit.

    Args:
        trace: the rows.
        dtype: of the logits that are compared; the trace's own by default.
    """
    parts = (part[:, [0, -1]].to(dtype or part.dtype).float().numpy() for part in trace.logits.split(SCANNED))
    return [hash(row.tobytes()) for part in parts for row in part]


def num_copies(trace: ExitTrace) -> int:
    """Rows that are copies of others."""
    return trace.num_rows - len(set(marks(trace)))


def check_not_learned_from(trace: ExitTrace, learned_from: ExitTrace | None) -> None:
    """Refuse rows that a policy learned from: on them it looks better than it is.

    Args:
        trace: rows to calibrate on.
        learned_from: of the same model; `None` where it is not known.

    Raises:
        CalibrationError: with how many there are, and the first; and for rows of another model, which cannot be compared.
        UsageError: for what is no trace.
    """
    if learned_from is None:
        return
    if not isinstance(learned_from, ExitTrace):
        raise unexpected("learned_from", learned_from, "the trace of those rows")
    for what in ("exit_layers", "problem_type", "fingerprint"):
        here, there = getattr(trace, what), getattr(learned_from, what)
        if here != there and here and there:
            raise CalibrationError(
                f"learned_from has {what} {there!r}, the trace {here!r}: rows of two models cannot be told to be the same. "
                "Collect both with one model.",
                field="learned_from",
            )
    narrow = min(trace.logits.dtype, learned_from.logits.dtype, key=lambda dtype: dtype.itemsize)
    known = set(marks(learned_from, narrow))
    if seen := [place for place, mark in enumerate(marks(trace, narrow)) if mark in known]:
        raise CalibrationError(
            f"{len(seen)} of {trace.num_rows} rows, row {seen[0]} the first, are among those that the policy learned from, "
            "on which it looks better than it is. Leave them out, or give the policy by its name: it then learns on rows "
            "set apart.",
            field="learned_from",
            value=seen[0],
        )
