"""Speeds are ratios of one run."""

import time

from hf_earlyexit.measuring.timing import compare_speed


def test_a_run_three_times_as_long_is_a_third_as_fast():
    order = []

    def wait(name, seconds):
        order.append(name)
        time.sleep(seconds)

    timings = compare_speed({"full": lambda: wait("full", 0.03), "early": lambda: wait("early", 0.01)}, "full", repeats=3)
    assert order == ["full", "early"] * 4  # in turn, one round to warm up
    assert timings["full"].speed_up == 1
    assert 1.8 < timings["early"].speed_up < 3.5
    assert timings["early"].low <= timings["early"].speed_up <= timings["early"].high
