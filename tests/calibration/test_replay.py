import numpy as np
import pytest

from hf_earlyexit.calibration import MaxDrop, calibrate, replay
from hf_earlyexit.policies import StaticPolicy
from tests.samples import learned_trace


def test_on_the_rows_that_chose_it_repeats_the_calibration():
    trace = learned_trace(300, seed=1)
    found = calibrate(trace, "confidence", MaxDrop(0.02))
    again = replay(found.policy, trace)
    for name in ("quality", "full_quality", "standard_error", "mean_layers", "mean_cost", "layer_speed_up", "exits"):
        assert getattr(again, name) == getattr(found, name), name


def test_on_other_rows_each_row_leaves_where_scan_and_decide_say():
    policy = calibrate(learned_trace(300, seed=1), "beem-a", MaxDrop(0.02)).policy
    other = learned_trace(200, seed=2)
    taken = policy.decide(policy.scan(other).scores).numpy()
    outcome = replay(policy, other)
    assert outcome.exit_layer.tolist() == (taken + 1).tolist()
    assert outcome.quality == pytest.approx(other.quality.numpy()[np.arange(200), taken].mean())
    assert len(set(taken.tolist())) > 2


@pytest.mark.parametrize("exit_index", [0, 2, 3])
def test_a_fixed_exit_by_hand(exit_index):
    trace = learned_trace(100, seed=3, cost=(2.0, 4.0, 6.0, 9.0))
    outcome = replay(StaticPolicy.at(exit_index, 4), trace)
    assert (outcome.mean_layers, outcome.layer_speed_up) == (exit_index + 1, 4 / (exit_index + 1))
    assert outcome.mean_cost == (2.0, 4.0, 6.0, 9.0)[exit_index]
    assert [report.share for report in outcome.exits] == [float(index == exit_index) for index in range(4)]
    assert (
        outcome.exits[exit_index].quality_of_leavers == outcome.quality == pytest.approx(outcome.exits[exit_index].quality)
    )
