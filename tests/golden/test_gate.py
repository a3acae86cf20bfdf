"""The gate policy, by hand."""

import math

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import ExitSignal

TRACE = {"logits": torch.zeros(4, 3, 2), "labels": torch.zeros(4, dtype=torch.long), "exit_layers": (4, 8, 12)}
GATES = torch.tensor([[0.1, -3.0], [-0.1, 0.0], [-2.0, -2.0], [-5.0, math.log(3)]])


def test_a_row_leaves_where_its_gate_says_at_least_one_half():
    policy, trace = ee.policies.GatePolicy.half(3), ee.ExitTrace(**TRACE, scalars={"gate": GATES})
    scores = policy.scan(trace).scores
    assert scores[:, 2].tolist() == [1.0] * 4  # the last exit has no gate: whoever is left leaves
    assert scores[3, 1].item() == pytest.approx(0.75)  # log-odds log 3
    assert scores[1, 1].item() == 0.5
    assert policy.decide(scores).tolist() == [0, 1, 2, 1]


def test_other_thresholds_give_other_points_of_the_same_gates():
    trace, policy = ee.ExitTrace(**TRACE, scalars={"gate": GATES}), ee.policies.GatePolicy.half(3)
    assert policy.with_thresholds(0.7).decide(policy.scan(trace).scores).tolist() == [2, 2, 2, 1]
    assert policy.with_thresholds(0.0).decide(policy.scan(trace).scores).tolist() == [0, 0, 0, 0]


def test_huge_gates_are_certain_and_finite():
    policy = ee.policies.GatePolicy.half(2)
    gate = torch.tensor([1e4, -1e4], dtype=torch.float16)
    _, score, _ = policy.update(policy.init_state(2, 2, "cpu"), ExitSignal(torch.zeros(2, 2), {"gate": gate}), 0)
    assert score.tolist() == [1.0, 0.0]
    assert score.dtype == torch.float32


def test_signals_without_gates_are_refused_with_what_to_do():
    trace = ee.ExitTrace(**TRACE)
    with pytest.raises(PolicyError, match="there are none: load the model with exit_gate='mlp'") as caught:
        ee.calibrate(trace, "gate")
    assert caught.value.field == "gate"
    with pytest.raises(PolicyError, match="there are none"):
        ee.replay(ee.policies.GatePolicy.half(3), trace)
