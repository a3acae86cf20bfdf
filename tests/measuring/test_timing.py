"""Speeds are ratios of one run."""

from types import SimpleNamespace

from hf_earlyexit.measuring import timing


def test_a_run_three_times_as_long_is_a_third_as_fast(monkeypatch):
    order, now = [], [100.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    busy = iter([50.0, 40.0, 1.0, 1.0, 2.0, 2.5, 1.0, 1.0])  # how slow the machine is at each run; the first round warms up

    def work(name, seconds):
        order.append(name)
        now[0] += seconds * next(busy)

    timings = timing.compare_speed({"full": lambda: work("full", 3.0), "early": lambda: work("early", 1.0)}, "full", 3)
    assert order == ["full", "early"] * 4  # in turn, one round to warm up
    assert timings["full"] == (3.0, 1.0, 1.0, 1.0)
    assert timings["early"] == (1.0, 3.0, 2.4, 3.0)
