"""An exit every so many layers: the others are as if they were not there."""

import dataclasses

import pytest

from hf_earlyexit.calibration import Certified, FinalLayerError, MaxDrop
from hf_earlyexit.errors import CalibrationError, UsageError
from hf_earlyexit.policies import POLICIES
from tests.samples import learned_trace, options_for

from . import calibrate


def with_exits(trace, places):
    """A trace of some of the exits."""
    return dataclasses.replace(
        trace,
        logits=trace.logits[:, places],
        exit_layers=tuple(trace.exit_layers[place] for place in places),
        scalars={name: values[:, [p for p in places if p < values.shape[1]]] for name, values in trace.scalars.items()},
    )


@pytest.mark.parametrize("target", [MaxDrop(0.01), FinalLayerError()], ids=str)
@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("name", POLICIES.names())
def test_thresholds_are_those_of_a_model_without_the_exits_between(name, every, target):
    trace = learned_trace(300, exits=6, seed=3)
    kept = [place for place in range(6) if (5 - place) % every == 0]
    options = options_for(name, exits=6)
    few_options = {"weights": tuple(options["weights"][place] for place in kept)} if options else {}
    got = calibrate(trace, name, target, every=every, options=options)
    expected = calibrate(with_exits(trace, kept), name, target, options=few_options)
    assert set(got.policy.muted) >= set(range(6)) - set(kept)
    assert [threshold for place, threshold in enumerate(got.policy.thresholds) if place not in kept] == [None] * (
        6 - len(kept)
    )
    assert [got.policy.thresholds[place] for place in kept[:-1]] == list(expected.policy.thresholds)
    assert (got.quality, got.mean_layers) == (expected.quality, expected.mean_layers)
    assert {report.layer for report in got.exits if report.share} <= {place + 1 for place in kept}


def test_a_ready_policy_and_a_promise_leave_exits_out_too():
    trace = learned_trace(600, exits=6, seed=3)
    ready = calibrate(trace, "confidence").policy
    assert calibrate(trace, ready, every=2).policy.muted == (0, 2, 4)
    assert calibrate(trace, "confidence", every=2, options={"muted": (1,)}).policy.muted == (0, 1, 2, 4)
    promised = calibrate(trace, "confidence", Certified(0.1, 0.9), every=2)
    assert promised.policy.muted == (0, 2, 4)
    assert promised.policy.may_leave


def test_weak_exits_stay_closed_among_those_that_are_left():
    trace = learned_trace(300, exits=6, seed=3)
    blind = trace.logits.clone()
    blind[:, 1] = 0.1
    trace = dataclasses.replace(trace, logits=blind)
    assert calibrate(trace, "confidence").policy.muted == (1,)
    assert calibrate(trace, "confidence", every=2).policy.muted == (0, 1, 2, 4)
    assert calibrate(trace, "confidence", every=2, keep_weak_exits=True).policy.muted == (0, 2, 4)


def test_exits_are_counted_from_the_last():
    trace = dataclasses.replace(learned_trace(300, exits=4), exit_layers=(2, 5, 8, 12))
    assert calibrate(trace, "confidence", every=4).policy.muted == (0, 1)
    assert calibrate(trace, "confidence", every=1).policy.muted == ()
    assert calibrate(trace, "confidence", every=5).policy.muted == (1, 2)


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_what_is_no_number_of_layers_is_refused(every):
    with pytest.raises(UsageError, match=r"every is .*expected a whole number"):
        calibrate(learned_trace(100), every=every)


def test_a_number_that_leaves_the_last_exit_alone_is_refused():
    words = r"every is 4, and no exit but the last stands 4 layers .* layers 1, 2, 3, 4"
    with pytest.raises(CalibrationError, match=words):
        calibrate(learned_trace(100), every=4)
    lone = dataclasses.replace(with_exits(learned_trace(100), [3]), scalars={})
    assert calibrate(lone, "confidence", every=4).policy.muted == ()
