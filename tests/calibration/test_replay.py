"""A replayed policy does what serving does."""

import numpy as np
import pytest

import hf_earlyexit as ee
from tests.samples import learned_trace


def test_figures_by_hand():
    trace = learned_trace(rows=200, exits=3)
    policy = ee.policies.StaticPolicy.at(1, 3)
    done = ee.replay(policy, trace)
    quality = trace.quality.numpy()
    assert done.exit_layer.tolist() == [2] * 200
    assert done.quality == pytest.approx(quality[:, 1].mean())
    assert done.full_quality == pytest.approx(quality[:, 2].mean())
    assert done.layer_speed_up == 1.5
    difference = quality[:, 1] - quality[:, 2]
    assert done.standard_error == pytest.approx(difference.std() / np.sqrt(200))
    assert [exit.share for exit in done.exits] == [0, 1, 0]
    assert done.exits[1].quality_of_leavers == pytest.approx(quality[:, 1].mean())
    assert done.exits[1].last_quality_of_leavers == pytest.approx(quality[:, 2].mean())
    assert done.exits[0].quality_of_leavers is None


def test_costs_other_than_layers_are_counted():
    trace = learned_trace(rows=50, exits=3, cost=(1.0, 1.5, 4.0))
    done = ee.replay(ee.policies.StaticPolicy.at(1, 3), trace)
    assert (done.mean_cost, done.mean_layers) == (1.5, 2.0)


@pytest.mark.parametrize(("exits", "rows"), [(4, 10), (3, 0)])
def test_other_exits_and_no_rows_are_refused(exits, rows):
    trace = learned_trace(rows=10, exits=3).select(range(rows))
    with pytest.raises(ee.EarlyExitError, match="expected the exits of one model, and rows"):
        ee.replay(ee.policies.StaticPolicy.at(0, exits), trace)


@pytest.mark.parametrize("order", ["turned", "no policy", "no trace"])
def test_what_is_no_policy_or_no_trace_is_refused(order):
    policy, trace = ee.policies.StaticPolicy.at(1, 3), learned_trace(rows=10, exits=3)
    given = {"turned": (trace, policy), "no policy": (None, trace), "no trace": (policy, "trace.safetensors")}[order]
    with pytest.raises(ee.EarlyExitError, match="expected a policy, then a trace"):
        ee.replay(*given)
