"""How long things take, measured in turns within one run, and how much faster one is than another."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Median seconds of one thing, and how many times faster it is than the reference, with the middle half's range."""

    seconds: float
    speed_up: float
    low: float
    high: float


def clock_for(device: torch.device) -> Callable[[], float]:
    """Seconds that other work hardly changes: on a CPU with one thread the processor's, else the wall clock's."""
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def seconds_in_turns(
    runs: Mapping[Name, Sequence[Callable[[], Any]]],
    turns: int,
    *,
    warm_up: int = 1,
    together: bool = False,
    clock: Callable[[], float] | None = None,
    seed: int = 0,
) -> dict[Name, Tensor]:
    """Time several things in turns, so that a busy machine slows all of them alike.

    Args:
        runs: by name, the jobs that it consists of, as many for each name. A turn runs all first jobs, then all second
            ones, each time in random order.
        turns: that count.
        warm_up: turns before them.
        together: a turn runs all jobs of one name, then all of another, in random order: what the jobs of a name share,
            such as weights, then stays in the processor's caches, as where nothing else is served.
        clock: seconds; the wall clock by default.
        seed: of the order.

    Returns:
        Seconds of every job in every turn, `[turns, jobs]`, float64.
    """
    clock, order = clock or time.perf_counter, random.Random(seed)
    count = max(map(len, runs.values()), default=0)
    seconds: dict[Name, list[list[float]]] = {name: [] for name in runs}
    for turn in range(warm_up + turns):
        times: dict[Name, list[float]] = {name: [] for name in runs}
        for jobs in [range(count)] if together else [range(job, job + 1) for job in range(count)]:
            for name, job in product(order.sample(list(runs), len(runs)), jobs):
                start = clock()
                runs[name][job]()
                times[name].append(clock() - start)
        if turn >= warm_up:
            for name, values in times.items():
                seconds[name].append(values)
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in seconds.items()}


def timing_of(seconds: Tensor, reference: Tensor) -> Timing:
    """A timing from the seconds of a thing and of the reference in the same turns, `[turns, jobs]` each."""
    turns = seconds.sum(1)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=turns.dtype)
    low, middle, high = (reference.sum(1) / turns).quantile(quarters).tolist()
    return Timing(float(turns.quantile(0.5)), middle, low, high)


def compare_speed(runs: Mapping[str, Callable[[], Any]], reference: str, repeats: int = 5) -> dict[str, Timing]:
    """How many times faster than one of them several things are, turn by turn.

    Args:
        runs: what to time, by name.
        reference: the name all others are compared with.
        repeats: turns after one to warm up.

    Returns:
        For each name, the median time and the median of the turns' ratios.
    """
    seconds = seconds_in_turns({name: [run] for name, run in runs.items()}, repeats)
    return {name: timing_of(times, seconds[reference]) for name, times in seconds.items()}
