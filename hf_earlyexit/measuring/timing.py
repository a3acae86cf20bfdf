"""How much faster one thing is than another, measured in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Timing(NamedTuple):
    """Median seconds of one thing, and how many times faster it is than the reference, with the middle half's range."""

    seconds: float
    speed_up: float
    low: float
    high: float


def compare_speed(runs: Mapping[str, Callable[[], Any]], reference: str, repeats: int = 5) -> dict[str, Timing]:
    """Time several things in turn, again and again, so that a busy machine slows all of them alike.

    Args:
        runs: what to time, by name.
        reference: the name all others are compared with, round by round.
        repeats: rounds after one to warm up.

    Returns:
        For each name, the median time and the median of the rounds' ratios.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_number:
                seconds[name].append(time.perf_counter() - start)
    timings = {}
    for name, times in seconds.items():
        ratios = sorted(base / elapsed for base, elapsed in zip(seconds[reference], times, strict=True))
        quarter = len(ratios) // 4
        timings[name] = Timing(
            statistics.median(times), statistics.median(ratios), ratios[quarter], ratios[len(ratios) - 1 - quarter]
        )
    return timings
