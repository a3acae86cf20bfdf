"""The policy that learns by reward on held-back rows: it finds what pays, at every price, from history."""

import numpy as np
import pytest
import torch

from hf_earlyexit.calibration import MaxDrop, calibrate
from hf_earlyexit.calibration.search import single_threshold_curve
from hf_earlyexit.errors import PolicyError
from hf_earlyexit.losses.consistentee import exit_log_probabilities
from hf_earlyexit.policies import POLICIES, RewardPolicy
from hf_earlyexit.policies.reward import (
    FEATURES,
    FLOOR,
    HALF_PRICE,
    LEARNING_RATE,
    MOST_ROWS,
    NUM_WEIGHTS,
    PRICE_SCALE,
    PRICES,
    RIDGE,
    STEPS,
    WIDTH,
    History,
    _look,
    _part,
    _slopes,
)
from hf_earlyexit.trace import ExitTrace
from tests.samples import learned_trace
from tests.work import calls


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


def by_autograd(trace):
    """Weights that torch's own gradients and optimizer find, from the objective as it is meant."""
    looks, state = [], History.empty(trace.num_rows, trace.logits.shape[-1], "cpu")
    for index in range(trace.num_exits - 1):
        state, features = _look(state, trace.logits[:, index], (index + 1) / trace.num_exits)
        looks.append(torch.stack(features, -1))
    seen, right = torch.stack(looks, 1), trace.quality > 0  # [N, E - 1, FEATURES]
    prices = torch.logspace(np.log10(PRICES[0]), np.log10(PRICES[1]), 10)[:, None]
    toll = (right[:, -1:] & ~right).float()[:, None] + prices * torch.tensor(trace.costs, dtype=torch.float32)
    weights = (0.3 * torch.randn(NUM_WEIGHTS, generator=torch.Generator().manual_seed(0))).requires_grad_()
    sharpness = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([weights, sharpness], lr=LEARNING_RATE)
    shrink = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        *inner, bias, outer = weights[:-1].view(FEATURES + 2, WIDTH)
        leave = (seen @ torch.stack(inner) + bias).relu() @ outer + weights[-1]
        gates = sharpness.exp() * (leave[:, None] + (prices / HALF_PRICE).log())
        paid = (exit_log_probabilities(gates).exp() * toll).sum(-1).mean(0)
        loss = (paid / (prices[:, 0] + PRICE_SCALE)).mean() + RIDGE * weights.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shrink.step()
    return weights.detach()


def test_it_learns_what_autograd_and_torchs_optimizer_learn():
    trace = learned_trace(300)
    learned = torch.tensor(RewardPolicy.from_trace(trace).weights)
    assert torch.allclose(learned, by_autograd(trace), atol=1e-4)
    assert not calls(lambda: RewardPolicy.from_trace(trace), "torch/optim", "torch/autograd", "torch/_dynamo")


def test_slopes_are_those_of_the_expected_toll():
    generator = torch.Generator().manual_seed(0)
    gates = (4 * torch.randn(5, 3, 7, generator=generator)).requires_grad_()
    toll = torch.rand(6, 3, 7, generator=generator)
    paid = (exit_log_probabilities(gates.movedim(0, -1)).exp() * toll.movedim(0, -1)).sum()
    assert torch.allclose(_slopes(gates.detach(), toll), *torch.autograd.grad(paid, gates), atol=1e-6)


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
    found = calibrate(learned_trace(600), "reward", MaxDrop(0.01), learning_share=0.5, keep_weak_exits=True, folds=2)
    assert found.expected.num_folds == 2
    assert (found.num_rows, found.num_learning_rows) == (300, 300)
    assert found.quality >= found.full_quality - 0.01
    assert found.layer_speed_up > 1.2


def test_what_the_network_sees_by_hand():
    # one row, three classes; the exits say class 0, then class 1, then class 1
    chances = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.5, 0.4]])
    logs, state, looks = chances.log(), History.empty(1, 3, "cpu"), []
    for index, row in enumerate(logs):
        state, features = _look(state, row[None], (index + 1) / 4)
        looks.append(torch.cat(features))
    assert looks[0][4] == 0  # nothing before the first exit to have risen from
    entropy = -float((chances[2] * logs[2]).sum())
    by_hand = [
        logs[2, 1] + 0.5,  # the answer's log-probability
        (logs[2, 1] - logs[2, 2]) / 2 - 1,  # its lead
        (1 - entropy / np.log(3)) - 0.5,
        logs[:, 1].mean() + 0.5,  # over all exits so far
        logs[2, 1] - logs[1, 1],  # against the exit before, not the one before that
        2 / 3 - 0.5,  # exits that chose it
        (logs[0, 1] + 1) / 2,  # the lowest it ever was
        2 * 0.75 - 1,
    ]
    assert looks[2].tolist() == pytest.approx([float(value) for value in by_hand], abs=1e-5)


def test_a_certain_exit_is_seen_as_finite():
    _, features = _look(History.empty(1, 2, "cpu"), torch.tensor([[1e4, -1e4]]), 0.5)
    assert bool(torch.isfinite(torch.cat(features)).all())
    state, _ = _look(History.empty(1, 2, "cpu"), torch.tensor([[1e4, -1e4]]), 0.5)
    assert state.lowest.tolist() == [[0.0, FLOOR]]


def test_serving_tells_the_network_how_deep_it_is():
    alike = torch.randn(50, 1, 3, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1)
    policy = RewardPolicy.from_trace(learned_trace(400))
    logits = policy.scan(ExitTrace(logits=alike, labels=torch.zeros(50, dtype=torch.long), exit_layers=(1, 2, 3, 4))).scores
    state, depths = History.empty(50, 3, "cpu"), []
    for index in range(4):
        state, features = _look(state, alike[:, index], (index + 1) / 4)
        depths.append(float(features[-1][0]))
        moved = by_matrices(policy, features)
        assert torch.allclose(logits[:, index], moved, atol=1e-5)
    assert depths == [-0.5, 0.0, 0.5, 1.0]


def by_matrices(policy, features):
    """The network by matrix products."""
    weights = torch.tensor(policy.weights)
    *inner, bias, outer = weights[:-1].view(FEATURES + 2, -1)
    return ((torch.stack(features, 1) @ torch.stack(inner) + bias).relu() @ outer + weights[-1]).sigmoid()


def test_an_error_that_the_last_exit_makes_too_is_no_reason_to_go_on():
    """Exit 1 errs, exit 2 is right, the last errs again: by harm nothing is lost at exit 1, by errors all is."""
    labels = torch.randint(3, (300,), generator=torch.Generator().manual_seed(0))
    answers = torch.stack([(labels + 1) % 3, labels, (labels + 1) % 3], 1)
    logits = 3 * torch.nn.functional.one_hot(answers, 3).float()
    trace = ExitTrace(logits=logits, labels=labels, exit_layers=(1, 2, 3))
    policy = RewardPolicy.from_trace(trace)
    assert set(policy.with_thresholds(0.5).decide(policy.scan(trace).scores).tolist()) == {0}
    knows = trace.logits.clone()
    knows[:, 2] = logits[:, 1]  # now the last exit knows better
    other = ExitTrace(logits=knows, labels=labels, exit_layers=(1, 2, 3))
    policy = RewardPolicy.from_trace(other)
    assert 0 not in policy.with_thresholds(0.5).decide(policy.scan(other).scores).tolist()


def test_each_member_learns_from_rows_of_its_own_and_a_single_one_from_all():
    trace = learned_trace(200)
    first, second = (_part(trace, member, 2).logits for member in (0, 1))
    assert len(first) == len(second) == 200
    assert not torch.equal(first, second)
    assert len(first.flatten(1).unique(dim=0)) < 180  # drawn with replacement
    assert torch.equal(_part(trace, 0, 1).logits, trace.logits)
    assert _part(learned_trace(MOST_ROWS + 5), 0, 1).num_rows == MOST_ROWS
