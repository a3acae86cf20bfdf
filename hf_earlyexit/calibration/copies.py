"""Rows that stand twice, or in two traces: known by what the first and the last exit said of them, to the bit."""

from __future__ import annotations

from ..errors import CalibrationError
from ..trace import ExitTrace
from ..values import unexpected


def marks(trace: ExitTrace) -> list[int]:
    """A number for each row, the same for rows with the same logits at the first and the last exit."""
    return [hash(row.tobytes()) for row in trace.logits[:, [0, -1]].float().numpy()]


def num_copies(trace: ExitTrace) -> int:
    """Rows that are copies of others."""
    return trace.num_rows - len(set(marks(trace)))


def check_not_learned_from(trace: ExitTrace, learned_from: ExitTrace | None) -> None:
    """Refuse rows that a policy learned from: on them it looks better than it is.

    Args:
        trace: rows to calibrate on.
        learned_from: of the same model; `None` where it is not known.

    Raises:
        CalibrationError: with how many there are, and the first.
        UsageError: for what is no trace.
    """
    if learned_from is None:
        return
    if not isinstance(learned_from, ExitTrace):
        raise unexpected("learned_from", learned_from, "the trace of those rows")
    known = set(marks(learned_from))
    if seen := [place for place, mark in enumerate(marks(trace)) if mark in known]:
        raise CalibrationError(
            f"{len(seen)} of {trace.num_rows} rows, row {seen[0]} the first, are among those that the policy learned from, "
            "on which it looks better than it is. Leave them out, or give the policy by its name: it then learns on rows "
            "set apart.",
            field="learned_from",
            value=seen[0],
        )
