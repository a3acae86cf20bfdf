"""BEEM with calibrated votes, by hand."""

import math

import pytest
import torch

from hf_earlyexit.policies import CalibratedBeemPolicy
from hf_earlyexit.trace import ExitTrace
from tests.samples import learned_trace, scan, two_class_row


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_votes_are_lines_and_agreeing_votes_are_averaged():
    policy = CalibratedBeemPolicy(thresholds=[0.9, 0.9, 0.9], slopes=[1, 2, 0.5, 1], offsets=[[0.1, -0.3]] * 4, memory=0.25)
    row = two_class_row((0.65, 0.8, 0.9, 0.95), (1, 1, 0, 0))
    lead = [math.log(p / (1 - p)) for p in (0.65, 0.8, 0.9, 0.95)]
    first = -0.3 + 1 * lead[0]
    second = 0.75 * (-0.3 + 2 * lead[1]) + 0.25 * first  # the same class: keeps a quarter
    third = 0.1 + 0.5 * lead[2]  # another class: starts afresh
    fourth = 0.75 * (0.1 + 1 * lead[3]) + 0.25 * third
    expected = [sigmoid(x) for x in (first, second, third, fourth)]
    assert scan(policy, row).scores[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_the_fit_recovers_how_often_leaving_does_harm():
    generator = torch.Generator().manual_seed(0)
    lead = 4 * torch.rand(20_000, generator=generator)
    harmless = torch.rand(20_000, generator=generator) < (0.5 + 1.5 * lead).sigmoid()
    early = torch.stack([lead, torch.zeros_like(lead)], -1)  # always says 0
    labels = (~harmless).long()  # where leaving harms, the last exit knows better
    last = torch.nn.functional.one_hot(labels, 2).float()
    trace = ExitTrace(logits=torch.stack([early, last], 1), labels=labels, exit_layers=(1, 2))
    learned = CalibratedBeemPolicy.learn(trace)
    assert learned["slopes"][0] == pytest.approx(1.5, abs=0.15)
    assert learned["offsets"][0][0] == pytest.approx(0.5, abs=0.15)


def test_the_fit_is_that_of_a_table_with_a_column_for_each_class():
    """Newton's method on the whole table of features, which the library never makes: it has as many columns as classes."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(7, (300,), generator=draw)
    logits = 2 * torch.randn(300, 2, 7, generator=draw)
    logits[torch.arange(300), :, labels] += 2
    trace = ExitTrace(logits=logits, labels=labels, exit_layers=(1, 2))
    right = logits.argmax(-1) == labels[:, None]
    top = logits[:, 0].log_softmax(-1).topk(2).values.double()
    table = torch.cat([torch.ones(300, 1), (top[:, :1] - top[:, 1:]), torch.eye(7)[logits[:, 0].argmax(-1)]], 1).double()
    table = torch.cat([table, table.mean(0, keepdim=True)])  # the row that is made up
    harmless = torch.cat([~(right[:, 1] & ~right[:, 0]), torch.zeros(1, dtype=torch.bool)]).double()
    penalty = torch.tensor([1e-6] + [1.0] * 8, dtype=torch.float64)
    weights = torch.zeros(9, dtype=torch.float64)
    for _ in range(20):
        chance = (table @ weights).sigmoid()
        slope = table.T @ (harmless - chance) - penalty * weights
        weights += torch.linalg.solve((table.T * (chance * (1 - chance))) @ table + penalty.diag(), slope)
    learned = CalibratedBeemPolicy.learn(trace)
    assert learned["slopes"][0] == pytest.approx(float(weights[1]), abs=1e-5)
    assert learned["offsets"][0] == pytest.approx((weights[0] + weights[2:]).tolist(), abs=1e-5)


def test_an_exit_that_never_harmed_is_still_not_certain():
    trace = learned_trace(rows=100, exits=2)
    same = ExitTrace(logits=trace.logits[:, -1:].repeat(1, 2, 1), labels=trace.labels, exit_layers=(1, 2))
    policy = CalibratedBeemPolicy.from_trace(same)
    assert float(policy.scan(same).scores.max()) < 1


def test_an_answer_that_the_last_exit_would_not_better_does_no_harm():
    # every row is said 0 with the same lead; half of the labels are 1, and there the last exit says 0 too
    labels = torch.tensor([0, 1] * 200)
    says_zero = torch.tensor([2.0, 0.0]).expand(400, 2)
    trace = ExitTrace(logits=torch.stack([says_zero, says_zero], 1), labels=labels, exit_layers=(1, 2))
    scores = CalibratedBeemPolicy.from_trace(trace).scan(trace).scores
    assert float(scores[:, 0].min()) > 0.98  # where half of the answers did harm it would be one half
    knows = torch.nn.functional.one_hot(labels, 2).float()
    trace = ExitTrace(logits=torch.stack([says_zero, knows], 1), labels=labels, exit_layers=(1, 2))
    scores = CalibratedBeemPolicy.from_trace(trace).scan(trace).scores
    assert scores[:, 0].tolist() == pytest.approx([0.5] * 400, abs=0.01)


def test_a_heavy_penalty_leaves_the_share_of_harm_as_it_is():
    # slopes and offsets by class are drawn to 0, the common offset is not: 1 row in 4 is harmed, and one is made up
    labels = torch.tensor([0, 0, 0, 1] * 100)
    early = torch.tensor([2.0, 0.0]).expand(400, 2)
    last = torch.nn.functional.one_hot(labels, 2).float()
    trace = ExitTrace(logits=torch.stack([early, last], 1), labels=labels, exit_layers=(1, 2))
    learned = CalibratedBeemPolicy.learn(trace, ridge=1e6)
    assert learned["slopes"][0] == pytest.approx(0, abs=1e-3)
    assert learned["offsets"][0] == pytest.approx([math.log(300 / 101)] * 2, abs=1e-3)


def test_each_exit_and_each_class_has_a_line_of_its_own():
    policy = CalibratedBeemPolicy(
        thresholds=[0.9, 0.9], slopes=[1, 2, 3], offsets=[[0.5, -1.0], [1.5, -2.0], [0.0, 0.25]], memory=0
    )
    lead = math.log(0.7 / 0.3)
    for classes in ((0, 0, 0), (1, 1, 1)):
        expected = [sigmoid(policy.offsets[i][c] + policy.slopes[i] * lead) for i, c in enumerate(classes)]
        assert scan(policy, two_class_row((0.7,) * 3, classes)).scores[0].tolist() == pytest.approx(expected, abs=1e-6)
