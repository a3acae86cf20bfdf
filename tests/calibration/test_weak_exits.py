"""Exits that know nothing, and exits that nobody takes."""

import dataclasses

import pytest
import torch

from hf_earlyexit.calibration import LayerBudget, MaxDrop
from hf_earlyexit.errors import CalibrationError
from hf_earlyexit.policies import POLICIES, ConfidencePolicy, PatiencePolicy
from tests.samples import learned_trace, options_for

from . import calibrate


def trace_with_weak_exits():
    """Exits 1 and 3 of five always say 0, loudly."""
    trace = learned_trace(400, exits=5, seed=1)
    logits = trace.logits.clone()
    logits[:, [0, 2]] = torch.tensor([9.0, 0.0, 0.0])
    return dataclasses.replace(trace, logits=logits, labels=trace.labels)


@pytest.mark.parametrize("per_exit", [True, False])
@pytest.mark.parametrize("name", POLICIES.names())
def test_weak_exits_are_closed_muted_and_noted(name, per_exit):
    found = calibrate(trace_with_weak_exits(), name, MaxDrop(0.1), per_exit=per_exit, options=options_for(name, exits=5))
    assert found.policy.muted == (0, 2)
    assert found.policy.thresholds[0] is found.policy.thresholds[2] is None
    assert found.exits[0].share == found.exits[2].share == 0
    assert "layers 1, 3 are no better than the most frequent answer" in found.notes[0]
    assert "closed and muted" in str(found)


def test_weak_exits_can_be_kept():
    found = calibrate(trace_with_weak_exits(), "confidence", LayerBudget(1.0), keep_weak_exits=True)
    assert found.policy.muted == ()
    assert found.exits[0].share == 1.0
    assert not any("muted" in note for note in found.notes)
    with pytest.raises(CalibrationError, match="keep weak exits open"):
        calibrate(trace_with_weak_exits(), "confidence", LayerBudget(1.0))


def test_a_trace_without_weak_exits_has_no_such_note():
    assert calibrate(learned_trace(400), "confidence", MaxDrop(0.1)).notes == ()


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (ConfidencePolicy(thresholds=(None,) * 4), None),
        (PatiencePolicy(thresholds=(None,) * 4, muted=(1,)), None),
        ("confidence", {"muted": (1,)}),
    ],
    ids=["ready", "ready-and-muted", "muted-by-option"],
)
def test_a_note_never_claims_more_than_the_policy_does(policy, options):
    found = calibrate(trace_with_weak_exits(), policy, MaxDrop(0.1), options=options)
    assert "layers 1, 3" in found.notes[0]
    assert {0, 2} <= set(found.policy.muted)
    assert found.exits[0].share == found.exits[2].share == 0
    if policy != ConfidencePolicy(thresholds=(None,) * 4):
        assert 1 in found.policy.muted  # what the caller muted stays muted


def test_when_nobody_leaves_early_the_note_says_which_scores_there_were():
    trace = learned_trace(300, seed=1)
    wrong = trace.logits.roll(1, -1)
    wrong[:, -1] = 3 * torch.eye(3)[trace.labels]  # the last exit is always right, the others nearly never
    found = calibrate(dataclasses.replace(trace, logits=wrong), "confidence", MaxDrop(0.0), keep_weak_exits=True)
    assert found.layer_speed_up == 1.0
    assert "no row leaves early: scores run from 0." in found.notes[0]


def test_when_every_exit_is_weak_the_full_model_is_the_answer_and_the_note_says_so():
    trace = learned_trace(300, seed=1)
    logits = trace.logits.clone()
    logits[:, :-1] = torch.tensor([9.0, 0.0, 0.0])
    found = calibrate(dataclasses.replace(trace, logits=logits), "confidence", MaxDrop(0.5))
    assert found.policy.thresholds == (None, None, None)
    assert "no exit is open" in found.notes[1]


def test_an_exit_opens_only_for_enough_rows():
    trace = learned_trace(300, seed=1)
    few = calibrate(trace, "confidence", MaxDrop(0.05), per_exit=True, min_leavers=1)
    many = calibrate(trace, "confidence", MaxDrop(0.05), per_exit=True, min_leavers=100)
    assert any(0 < report.share * 300 < 100 for report in few.exits[:-1])
    assert all(report.share == 0 or report.share * 300 >= 100 - 1e-6 for report in many.exits[:-1])
