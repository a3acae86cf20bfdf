"""The estimators agree, find known optima, stay finite, and refuse what cannot work."""

import pytest
import torch

from hf_earlyexit.errors import TrainingError, UnknownNameError
from hf_earlyexit.losses.consistentee import ESTIMATORS, ConsistentObjective, exit_log_probabilities
from hf_earlyexit.losses.noise import row_keys, row_noise

LAYERS = torch.arange(1.0, 5)


def batch(rows=6, seed=0):
    """Gates, losses of 4 exits and hardness of some rows."""
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(rows, 3, generator=generator)
    losses = torch.rand(rows, 4, generator=generator) * torch.tensor([2.0, 1.5, 1.0, 0.5])
    return gates, losses, 4 * torch.rand(rows, generator=generator)


def gradient(objective, gates, losses, hardness, noise=None):
    gates = gates.clone().requires_grad_()
    objective(gates, losses, hardness, LAYERS, noise).gate_loss.backward()
    return gates.grad


# --- the exit distribution ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_exit_distribution_sums_to_one(scale, dtype):
    gates = torch.randn(200, 11, generator=torch.Generator().manual_seed(0))
    logs = exit_log_probabilities((gates / gates.abs().max() * scale).to(dtype))
    assert logs.dtype == torch.float32
    assert bool(torch.isfinite(logs).all())
    assert torch.allclose(logs.exp().sum(1), torch.ones(200), atol=1e-5)


def test_without_early_exits_everybody_takes_the_last():
    assert exit_log_probabilities(torch.zeros(3, 0)).exp().tolist() == [[1.0]] * 3


@pytest.mark.parametrize("estimator", ESTIMATORS.names())
@pytest.mark.parametrize("gate", [1e4, -1e4, 0.0])
def test_saturated_gates_give_finite_losses_and_gradients(estimator, gate):
    _, losses, hardness = batch()
    objective = ConsistentObjective(estimator=estimator, rollouts=4)
    gates = torch.full((6, 3), gate, dtype=torch.float16, requires_grad=True)
    value = objective(gates, losses, hardness, LAYERS, row_noise(torch.arange(6), 0, 0, (4, 3)))
    value.gate_loss.backward()
    assert all(bool(torch.isfinite(part).all()) for part in (*value, gates.grad))


@pytest.mark.parametrize("action", ["sample", "argmax"])
def test_the_last_exit_takes_whoever_no_gate_lets_out(action):
    objective = ConsistentObjective(action=action, rollouts=50)
    noise = row_noise(torch.arange(6), 0, 0, (50, 3))
    assert bool((objective.draw_exits(torch.full((6, 3), -1e4), noise) == 3).all())
    assert objective.draw_exits(torch.zeros(6, 0), torch.zeros(6, 50, 0)).max() == 0


# --- the two estimators -------------------------------------------------------------------------------------------------


def test_rollouts_agree_with_the_exact_gradient_in_expectation():
    gates, losses, hardness = batch()
    exact = gradient(ConsistentObjective(alpha=0.1, estimator="exact"), gates, losses, hardness)
    rollouts, visits = 8, 4000
    drawn = ConsistentObjective(alpha=0.1, rollouts=rollouts)
    keys = torch.arange(6)
    many = torch.stack(
        [gradient(drawn, gates, losses, hardness, row_noise(keys, 0, v, (rollouts, 3))) for v in range(visits)]
    )
    error = many.std(0) / visits**0.5
    # the baseline holds the rollout itself, which takes 1 / rollouts off
    apart = (many.mean(0) - (1 - 1 / rollouts) * exact) / error
    assert apart.abs().max() < 4
    assert (exact.abs() / error).max() > 40  # the test would see a bias


@pytest.mark.parametrize("biased", [{"action": "argmax", "epsilon": 0.5}, {"epsilon": 0.5}], ids=repr)
def test_the_released_actions_are_biased(biased):
    gates, losses, hardness = batch()
    exact = gradient(ConsistentObjective(alpha=0.1, estimator="exact"), gates, losses, hardness)
    drawn, noise = ConsistentObjective(alpha=0.1, rollouts=20_000, **biased), row_noise(torch.arange(6), 0, 0, (20_000, 3))
    assert (gradient(drawn, gates, losses, hardness, noise) - exact).abs().max() > 0.1 * exact.abs().max()


def test_greedy_rollouts_without_chance_teach_nothing():
    gates, losses, hardness = batch()
    noise = row_noise(torch.arange(6), 0, 0, (8, 3))
    assert gradient(ConsistentObjective(action="argmax"), gates, losses, hardness, noise).abs().max() < 1e-7


@pytest.mark.parametrize("estimator", ESTIMATORS.names())
@pytest.mark.parametrize(
    ("losses", "best"), [([0.3, 0.9, 0.9, 0.9], 0), ([0.9, 0.8, 0.1, 0.2], 2), ([2.0, 1.5, 1.0, 0.0], 3)]
)
def test_a_bandit_finds_its_best_exit(estimator, losses, best):
    """One row, always the same: its gates end at the exit with the largest reward, at alpha 0.1 a layer."""
    objective = ConsistentObjective(alpha=0.1, estimator=estimator)
    losses, hardness = torch.tensor([losses]), torch.zeros(1)
    rewards = objective.rewards(losses, hardness, LAYERS)
    assert int(rewards.argmax()) == best
    gates = torch.zeros(1, 3, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=0.1)
    for step in range(600):
        optimizer.zero_grad()
        noise = row_noise(torch.tensor([7]), 0, step, (8, 3))
        value = objective(gates, losses, hardness, LAYERS, noise)
        value.gate_loss.backward()
        optimizer.step()
    chance = exit_log_probabilities(gates.detach()).exp()[0]
    assert chance[best] > 0.97
    assert float((chance * rewards[0]).sum()) == pytest.approx(float(rewards.max()), abs=0.05)


def test_epsilon_is_a_fair_coin():
    objective = ConsistentObjective(action="argmax", epsilon=0.4, rollouts=50_000)
    taken = objective.draw_exits(torch.tensor([[3.0], [-3.0]]), row_noise(torch.arange(2), 0, 0, (50_000, 1)))
    assert (taken == 0).float().mean(1).tolist() == pytest.approx([0.8, 0.2], abs=0.01)


def test_sampled_exits_follow_the_distribution():
    gates, _, _ = batch(rows=1)
    taken = ConsistentObjective(rollouts=50_000).draw_exits(gates, row_noise(torch.arange(1), 0, 0, (50_000, 3)))
    share = torch.bincount(taken[0], minlength=4) / 50_000
    assert share.tolist() == pytest.approx(exit_log_probabilities(gates).exp()[0].tolist(), abs=0.01)


# --- noise --------------------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_row_not_to_its_place():
    keys = row_keys(["a", "b", 3, "3"])
    whole = row_noise(keys, seed=1, visit=5, shape=(8, 11))
    assert torch.equal(row_noise(keys[[2, 0]], 1, 5, (8, 11)), whole[[2, 0]])
    assert torch.equal(row_noise(keys, 1, 5, (8, 11)), whole)


def test_noise_differs_between_rows_seeds_visits_and_places():
    keys = row_keys(range(50))
    draws = [row_noise(keys, seed, visit, (4, 5)) for seed, visit in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert len(torch.stack(draws).flatten().unique()) > 0.999 * 4 * 50 * 20
    assert len(set(row_keys([1, "1", 2, -1]).tolist())) == 4


def test_noise_is_uniform_and_independent():
    noise = row_noise(row_keys(range(4000)), 3, 9, (10,))
    assert noise.min() >= 0
    assert noise.max() < 1
    assert (torch.histc(noise, 20, 0, 1) / 2000 - 1).abs().max() < 0.1
    centred = noise - 0.5
    apart = (centred.T @ centred / 4000 * 12 - torch.eye(10)).abs()
    assert apart.max() < 0.09
    assert (centred[:-1] * centred[1:]).mean().abs() * 12 < 0.03


# --- what cannot work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "bad"),
    [("alpha", bad) for bad in (-0.01, float("nan"), float("inf"), "0.1", None, True)]
    + [("epsilon", bad) for bad in (-0.1, 1.1, float("nan"))]
    + [("rollouts", bad) for bad in (0, 1, -3, 2.0, True, None)]
    + [("action", bad) for bad in ("greedy", None)],
)
def test_what_cannot_work_is_refused_by_name(field, bad):
    with pytest.raises(TrainingError, match=f"{field} is ") as caught:
        ConsistentObjective(**{field: bad})
    assert caught.value.field == field


def test_an_unknown_estimator_comes_with_a_suggestion():
    with pytest.raises(UnknownNameError, match=r"Unknown estimator 'reinforced'\. Did you mean 'reinforce'"):
        ConsistentObjective(estimator="reinforced")


def test_rollouts_without_noise_of_their_shape_are_refused():
    gates, losses, hardness = batch()
    for noise in (None, torch.rand(6, 7, 3)):
        with pytest.raises(TrainingError, match=r"reinforce needs uniform numbers \[6, 8, 3\]"):
            ConsistentObjective()(gates, losses, hardness, LAYERS, noise)


@pytest.mark.parametrize("estimator", ESTIMATORS.names())
def test_the_loss_of_the_exits_says_nothing_to_the_gates_and_the_gates_loss_nothing_to_the_exits(estimator):
    gates, losses, hardness = (part.requires_grad_() for part in batch())
    objective = ConsistentObjective(estimator=estimator)
    value = objective(gates, losses, hardness.detach(), LAYERS, row_noise(torch.arange(6), 0, 0, (8, 3)))
    of_exits = torch.autograd.grad(value.exit_loss, (gates, losses), retain_graph=True, allow_unused=True)
    of_gates = torch.autograd.grad(value.gate_loss, (gates, losses), allow_unused=True)
    assert of_exits[0] is None
    assert float(of_exits[1].abs().max()) > 0
    assert of_gates[1] is None
    assert float(of_gates[0].abs().max()) > 0


@pytest.mark.parametrize(("chance", "taken"), [(0.45, 1), (0.499, 1), (0.501, 0), (0.55, 0)])
def test_argmax_leaves_above_one_half_and_not_before(chance, taken):
    objective = ConsistentObjective(action="argmax", rollouts=4)
    drawn = objective.draw_exits(torch.tensor([[chance]]).logit(), row_noise(torch.arange(1), 0, 0, (4, 1)))
    assert drawn.tolist() == [[taken] * 4]


def test_the_exits_loss_is_that_of_the_exits_the_rollouts_took():
    # three of four rollouts leave at the first exit
    noise = torch.tensor([[[0.1], [0.1], [0.1], [0.9]]])
    objective, losses = ConsistentObjective(rollouts=4), torch.tensor([[0.4, 0.8]], requires_grad=True)
    value = objective(torch.zeros(1, 1), losses, torch.zeros(1), torch.tensor([1.0, 2.0]), noise)
    assert value.exit_loss.item() == pytest.approx(0.75 * 0.4 + 0.25 * 0.8)
    value.exit_loss.backward()
    assert losses.grad.tolist() == [[0.75, 0.25]]
