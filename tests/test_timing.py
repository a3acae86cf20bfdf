"""Speeds are ratios of one run."""

import time
from types import SimpleNamespace

import pytest
import torch

from hf_earlyexit import timing


def test_a_run_three_times_as_long_is_a_third_as_fast(monkeypatch):
    order, now = [], [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    busy = {"full": iter([50.0, 1.0, 2.0, 1.0]), "early": iter([40.0, 1.0, 2.5, 1.0])}  # how slow the machine is at each run

    def work(name, seconds):
        order.append(name)
        now[0] += seconds * next(busy[name])

    timings = timing.compare_speed({"full": lambda: work("full", 3.0), "early": lambda: work("early", 1.0)}, "full", 3)
    assert [set(order[place : place + 2]) for place in (0, 2, 4, 6)] == [{"full", "early"}] * 4  # a turn to warm up
    assert order[::2].count("full") not in (0, 4)  # neither always goes first
    assert timings["full"] == (3.0, 1.0, 1.0, 1.0)
    assert timings["early"] == pytest.approx((1.0, 3.0, 2.7, 3.0))  # ratios 3, 2.4 and 3


@pytest.mark.parametrize("warm_up", [0, 1, 2])
def test_turns_to_warm_up_are_not_counted(warm_up):
    now, calls = [0.0], []

    def job():
        calls.append(1)
        now[0] += len(calls)

    seconds = timing.seconds_in_turns({"way": [job, job]}, 2, warm_up=warm_up, clock=lambda: now[0])["way"]
    first = 2 * warm_up
    assert seconds.tolist() == [[first + 1.0, first + 2.0], [first + 3.0, first + 4.0]]


def test_a_turn_runs_all_first_jobs_and_then_all_second():
    calls = []
    runs = {name: [lambda key=f"{name}{job}": calls.append(key) for job in (1, 2)] for name in "abc"}
    timing.seconds_in_turns(runs, 5, seed=3)
    turns = [tuple(calls[place : place + 3]) for place in range(0, len(calls), 3)]
    assert [{key[1] for key in turn} for turn in turns] == [{"1"}, {"2"}] * 6
    assert all({key[0] for key in turn} == set("abc") for turn in turns)
    assert len({tuple(key[0] for key in turn) for turn in turns}) > 2  # in random order


def test_or_all_jobs_of_one_name_and_then_of_another():
    calls = []
    runs = {name: [lambda key=f"{name}{job}": calls.append(key) for job in (1, 2)] for name in "abc"}
    seconds = timing.seconds_in_turns(runs, 5, together=True, clock=lambda: float(len(calls)) ** 2, seed=3)
    pairs = [tuple(calls[place : place + 2]) for place in range(0, len(calls), 2)]
    assert set(pairs) == {("a1", "a2"), ("b1", "b2"), ("c1", "c2")}
    turns = [tuple(pair[0][0] for pair in pairs[place : place + 3]) for place in range(0, len(pairs), 3)]
    assert all(set(turn) == set("abc") for turn in turns)
    assert len(set(turns)) > 2
    at = 6 + 2 * turns[1].index("b")  # behind the turn to warm up; a job takes (n + 1)^2 - n^2
    assert seconds["b"][0].tolist() == [2 * at + 1, 2 * at + 3]


def test_a_timing_is_of_whole_turns():
    seconds, reference = torch.tensor([[1.0, 1.0], [1.0, 3.0]]), torch.tensor([[4.0, 4.0], [4.0, 4.0]])
    assert timing.timing_of(seconds.double(), reference.double()) == (3.0, 3.0, 2.5, 3.5)


@pytest.mark.parametrize(("device", "threads", "clock"), [("cpu", 1, "process_time"), ("cpu", 2, "perf_counter"),
                                                          ("cuda", 1, "perf_counter")])  # fmt: skip
def test_the_clock_is_the_processors_where_one_thread_works(device, threads, clock, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert timing.clock_for(torch.device(device)) is getattr(time, clock)
