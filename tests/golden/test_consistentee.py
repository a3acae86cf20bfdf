"""ConsistentEE's reward, exit distribution and estimators, by hand."""

import math

import pytest
import torch

from hf_earlyexit.losses.consistentee import ConsistentObjective, exit_log_probabilities

LAYERS = torch.arange(1.0, 13)


def logit(p):
    return math.log(p / (1 - p))


def test_the_reward_is_minus_the_loss_minus_the_price_of_the_layers():
    losses = torch.full((1, 12), 0.2)
    reward = ConsistentObjective(alpha=0.06).rewards(losses, torch.tensor([3.0]), LAYERS)
    assert reward[0, 3].item() == pytest.approx(-0.20 - 0.06 * (1 - 3 / 12) * 4) == pytest.approx(-0.38)


def test_the_hardest_rows_travel_for_free_and_without_hardness_all_pay_alike():
    losses = torch.tensor([[0.7, 0.5, 0.1], [0.7, 0.5, 0.1]])
    reward = ConsistentObjective(alpha=0.1).rewards(losses, torch.tensor([6.0, 0.0]), torch.tensor([2.0, 4.0, 6.0]))
    assert reward[0].tolist() == pytest.approx([-0.7, -0.5, -0.1])
    assert reward[1].tolist() == pytest.approx([-0.7 - 0.2, -0.5 - 0.4, -0.1 - 0.6])


def test_a_way_is_as_likely_as_its_steps():
    gates = torch.tensor([[logit(0.2), logit(0.5), logit(0.9)]])
    by_hand = [0.2, 0.8 * 0.5, 0.8 * 0.5 * 0.9, 0.8 * 0.5 * 0.1]
    assert exit_log_probabilities(gates).exp()[0].tolist() == pytest.approx(by_hand)


def test_two_rollouts_are_pushed_by_how_they_differ_from_their_mean():
    # rewards -.38 and -.50: baseline -.44, advantages +.06 and -.06
    objective = ConsistentObjective(alpha=0.0, rollouts=2)
    gates = torch.tensor([[logit(0.25)]], requires_grad=True)
    losses = torch.tensor([[0.38, 0.50]])
    noise = torch.tensor([[[0.2], [0.3]]])  # 0.2 < 0.25 leaves at the first exit, 0.3 goes on
    value = objective(gates, losses, torch.zeros(1), torch.tensor([1.0, 2.0]), noise)
    loss = -(0.06 * math.log(0.25) - 0.06 * math.log(0.75)) / 2
    assert value.gate_loss.item() == pytest.approx(loss)
    assert value.reward.item() == pytest.approx(-0.44)
    assert value.exit_loss.item() == pytest.approx(0.44)
    assert value.exit_share.tolist() == [0.5, 0.5]
    value.gate_loss.backward()  # d log p / dg = 1 - p, d log(1 - p) / dg = -p
    assert gates.grad.item() == pytest.approx(-(0.06 * 0.75 + 0.06 * 0.25) / 2)


def test_the_exact_reward_is_the_expectation_over_the_exits():
    objective = ConsistentObjective(alpha=0.1, estimator="exact")
    gates = torch.tensor([[logit(0.2), logit(0.5)]], requires_grad=True)
    losses = torch.tensor([[0.9, 0.4, 0.3]], requires_grad=True)
    value = objective(gates, losses, torch.tensor([1.5]), torch.tensor([1.0, 2.0, 3.0]))
    rewards = [-0.9 - 0.05, -0.4 - 0.10, -0.3 - 0.15]  # half the price: 1 - 1.5 / 3
    expected = 0.2 * rewards[0] + 0.4 * rewards[1] + 0.4 * rewards[2]
    assert value.reward.item() == pytest.approx(expected)
    assert value.gate_loss.item() == pytest.approx(-expected)
    assert value.exit_loss.item() == pytest.approx(0.2 * 0.9 + 0.4 * 0.4 + 0.4 * 0.3)
    value.gate_loss.backward(retain_graph=True)
    later = 0.5 * rewards[1] + 0.5 * rewards[2]
    assert gates.grad[0, 0].item() == pytest.approx(-0.2 * 0.8 * (rewards[0] - later))
    assert losses.grad is None
    value.exit_loss.backward()
    assert losses.grad[0].tolist() == pytest.approx([0.2, 0.4, 0.4])
