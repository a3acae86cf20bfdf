"""Tell what a monitor saw: how often early answers differ from the full model's, and whether rows leave as they did.

    hf-earlyexit monitor monitor.json
    hf-earlyexit monitor --log monitor.json --json true

The file is what `Monitor.save` writes. The status is 1 after an alarm, so that a scheduled job notices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from .command_result import CommandResult


@dataclass
class MonitorArguments:
    """Which monitor."""

    WORDS: ClassVar[tuple[str, ...]] = ("log",)

    log: str = field(metadata={"help": "file of a saved monitor"})


ARGUMENTS = (MonitorArguments,)


def run(args: MonitorArguments) -> CommandResult:
    """Load and print."""
    from ..serving.monitor import Monitor

    monitor = Monitor.load(args.log)
    lower, upper = monitor.bounds()
    values = {**monitor.to_dict(), "disagreement": [lower, upper], "shift": monitor.shift(monitor.state.exits)}
    return CommandResult(values, str(monitor), status=1 if monitor.state.alarms else 0)
