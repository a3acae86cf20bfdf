"""The policy that learns by reward on held-back rows: it finds what pays, at every price, from history."""

import numpy as np
import pytest
import torch

from hf_earlyexit.calibration import MaxDrop, calibrate
from hf_earlyexit.calibration.search import single_threshold_curve
from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import POLICIES, RewardPolicy
from hf_earlyexit.policies.reward import FEATURES, HALF_PRICE, NUM_WEIGHTS, WIDTH
from hf_earlyexit.trace import ExitTrace
from tests.samples import learned_trace


def fickle_trace(rows=600, seed=0):
    """Every exit is equally sure; an answer is right once two exits in a row have given it, so only history tells."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    settled = torch.randint(1, 6, (rows,), generator=generator)  # exits from here on are right
    answers = labels[:, None].repeat(1, 6)
    for index in range(6):
        early = index < settled  # before, each exit gives another wrong answer
        answers[early, index] = (labels[early] + 1 + index % 2) % 3
    logits = 3 * torch.nn.functional.one_hot(answers, 3).float() + 0.1 * torch.randn(rows, 6, 3, generator=generator)
    return ExitTrace(logits=logits, labels=labels, exit_layers=tuple(range(1, 7)))


def best(policy, trace, price):
    """The least of harm and priced layers a row, over all thresholds, and what the threshold of this price costs."""
    scores = policy.scan(trace).scores.double().numpy()
    right = trace.quality.numpy() > 0
    harm = (right[:, -1:] & ~right).astype(float)
    curve = single_threshold_curve(scores, harm, np.asarray(trace.costs), 0.0, False)
    taken = policy.with_thresholds(1 / (1 + price / HALF_PRICE)).decide(policy.scan(trace).scores).numpy()
    own = harm[np.arange(len(taken)), taken].mean() + price * (taken + 1).mean()
    return float((curve.quality + price * curve.cost).min()), float(own)


def test_history_tells_when_to_leave_where_confidence_cannot():
    learning, judging = fickle_trace(), fickle_trace(seed=1)
    learned, sure = RewardPolicy.from_trace(learning), POLICIES.get("confidence").from_trace(judging)
    assert best(learned, judging, 0.05)[0] < best(sure, judging, 0.05)[0] - 0.02


@pytest.mark.parametrize("price", [0.005, 0.02, 0.1, 0.4])
def test_each_threshold_belongs_to_its_price(price):
    policy = RewardPolicy.from_trace(learned_trace(800))
    cheapest, own = best(policy, learned_trace(800, seed=1), price)
    assert own < cheapest + 0.03
    wrong = [best(policy, learned_trace(800, seed=1), other)[1] for other in (1e-6, 1e6)]
    assert own < max(wrong) - 0.03  # the test would see a threshold of another price


def test_learning_is_the_same_every_time_and_in_every_order():
    trace = learned_trace(200)
    first, again = RewardPolicy.from_trace(trace), RewardPolicy.from_trace(trace)
    assert first == again
    turned = RewardPolicy.from_trace(trace.select(range(199, -1, -1)))
    scores = (first.scan(trace).scores - turned.scan(trace).scores).abs()
    assert scores.max() < 0.02


def test_muted_exits_teach_nothing():
    trace = learned_trace(200)
    noise = trace.logits.clone()
    noise[:, 1] = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    other = ExitTrace(logits=noise, labels=trace.labels, exit_layers=trace.exit_layers)
    taught = [RewardPolicy.from_trace(rows, muted=(1,)).weights for rows in (trace, other)]
    assert taught[0] == taught[1] != RewardPolicy.from_trace(other).weights
    assert RewardPolicy.from_trace(trace, muted=(0, 1, 2)).thresholds == (None,) * 3


def test_members_are_taught_apart_and_speak_as_one():
    trace = learned_trace(300)
    together = RewardPolicy.from_trace(trace, members=3)
    assert len(together.weights) == 3 * (NUM_WEIGHTS - 1) + 1
    alone = [RewardPolicy(thresholds=(None,) * 3, weights=weights) for weights in apart(together.weights)]
    said = torch.stack([policy.scan(trace).scores.logit() for policy in alone])
    exact = said.abs().amax(0) < 4  # float32 keeps few digits of a probability near 1
    assert exact.float().mean() > 0.5
    assert torch.allclose(together.scan(trace).scores.logit()[exact], said.mean(0)[exact], atol=1e-4)
    assert (said[0] - said[1]).abs().max() > 0.1  # each from its own start and rows
    assert RewardPolicy.from_trace(trace, members=1) == RewardPolicy.from_trace(trace)
    assert RewardPolicy.from_dict(together.to_dict()) == together


def apart(weights):
    """The weights of each member: hidden units lie side by side, the way out of them is divided by their number."""
    *inner, bias, outer = torch.tensor(weights[:-1]).view(FEATURES + 2, -1)
    members = len(bias) // WIDTH
    rows = torch.stack([*inner, bias, members * outer]).split(WIDTH, 1)
    return [(*part.flatten().tolist(), weights[-1]) for part in rows]


@pytest.mark.parametrize("members", [0, -1, 1.5, True, "two"], ids=repr)
def test_members_that_are_no_number_of_networks_are_refused(members):
    with pytest.raises(PolicyError, match="whole number from 1") as caught:
        RewardPolicy.from_trace(learned_trace(50), members=members)
    assert caught.value.field == "members"


def test_it_is_calibrated_as_every_policy():
    found = calibrate(learned_trace(600), "reward", MaxDrop(0.01), learning_share=0.5, keep_weak_exits=True)
    assert (found.num_rows, found.num_learning_rows) == (300, 300)
    assert found.quality >= found.full_quality - 0.01
    assert found.layer_speed_up > 1.2
