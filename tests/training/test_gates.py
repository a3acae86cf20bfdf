"""Gates taught all at once from cached states learn what a plain loop over them would teach."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.base import row_losses
from hf_earlyexit.losses.noise import row_keys, row_noise
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.training.gates import EpsilonSchedule, GateRecipe, train_gates
from hf_earlyexit.training.states import GateStates, collect_states
from tests.samples import learned_trace

RECIPE = GateRecipe(epochs=3, batch_size=8, learning_rate=3e-3, seed=5)


def make_gates(kind, seed=0):
    torch.manual_seed(seed)
    return nn.ModuleDict({str(layer): GATES.get(kind)(16, 3) for layer in (1, 2, 3)})


def make_data(rows=30):
    generator = torch.Generator().manual_seed(1)
    return GateStates(states=torch.randn(rows, 3, 16, generator=generator), trace=learned_trace(rows))


def hardness_of(rows):
    """From easy to hard, so that no two batches are alike."""
    return torch.linspace(0, 4, rows)


def one_by_one(gates, data, hardness, keys, objective, recipe, epsilon=None):
    """The slow reference: each gate called as a module, the rows of each step by hand."""
    parameters = list(gates.parameters())
    losses = row_losses(data.trace.logits, data.trace.labels, data.trace.problem_type)
    layers = torch.tensor(data.trace.exit_layers, dtype=torch.float32)
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(recipe.seed)
    steps, step = recipe.epochs * math.ceil(len(keys) / recipe.batch_size), 0
    for epoch in range(1, recipe.epochs + 1):
        shuffled = torch.randperm(len(keys), generator=order).tolist()
        for start in range(0, len(keys), recipe.batch_size):
            rows = shuffled[start : start + recipe.batch_size]
            optimizer.param_groups[0]["lr"] = recipe.learning_rate * (1 - step / steps)
            said = [gate(data.states[rows, i], data.trace.logits[rows, i]) for i, gate in enumerate(gates.values())]
            now = objective if epsilon is None else replace(objective, epsilon=epsilon.at(step))
            noise = row_noise(keys[rows], recipe.seed, epoch, (now.rollouts, 3)) if now.draws else None
            loss = now(torch.stack(said, 1), losses[rows], hardness[rows], layers, noise).gate_loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1


def apart(first, second):
    return max(float((a - b).detach().abs().max()) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("epsilon", [None, EpsilonSchedule(start=0.9, end=0.1, decay=4)], ids=["sure", "coin"])
@pytest.mark.parametrize("estimator", ["reinforce", "exact"])
@pytest.mark.parametrize("kind", GATES.names())
def test_all_gates_at_once_learn_what_a_plain_loop_teaches(kind, estimator, epsilon):
    data, objective = make_data(), ConsistentObjective(alpha=0.3, estimator=estimator)
    keys, hardness = row_keys(range(30)), hardness_of(30)
    start, quick, slow = (make_gates(kind) for _ in range(3))
    train_gates(quick, data, hardness, keys, objective, RECIPE, epsilon)
    one_by_one(slow, data, hardness, keys, objective, RECIPE, epsilon)
    assert apart(quick, slow) < 1e-4
    assert apart(quick, start) > 1e-2  # they have learned


@pytest.mark.parametrize("what", ["hardness", "noise"])
def test_the_reference_would_show_another_rows_hardness_and_another_rows_noise(what):
    data, objective = make_data(), ConsistentObjective(alpha=0.3)
    keys, hardness = row_keys(range(30)), hardness_of(30)
    right, wrong = make_gates("mlp"), make_gates("mlp")
    one_by_one(right, data, hardness, keys, objective, RECIPE)
    turned = (hardness.flip(0), keys) if what == "hardness" else (hardness, keys.flip(0))
    one_by_one(wrong, data, *turned, objective, RECIPE)
    assert apart(right, wrong) > 1e-3


def test_every_gate_keeps_weights_of_its_own():
    data, gates, before = make_data(), make_gates("mlp"), make_gates("mlp")
    recipe = GateRecipe(epochs=1, batch_size=30, learning_rate=1e-6)
    train_gates(gates, data, hardness_of(30), row_keys(range(30)), ConsistentObjective(), recipe)
    assert apart(gates, before) < 1e-5
    assert apart(gates["1"], gates["2"]) > 0.1


@pytest.mark.parametrize("kind", GATES.names())
def test_what_cached_states_say_is_what_each_gate_says(kind):
    data, gates = make_data(), make_gates(kind)
    said = data.gate_logits(gates)
    for index, gate in enumerate(gates.values()):
        alone = [gate(data.states[row, index][None], data.trace.logits[row, index][None]).item() for row in range(30)]
        assert said[:, index].tolist() == pytest.approx(alone, abs=1e-5)
    assert torch.equal(data.judged(gates).scalars["gate"], said)


def test_each_epoch_is_told_of_when_the_gates_hold_it():
    gates, told = make_gates("linear"), []
    train_gates(gates, make_data(), hardness_of(30), row_keys(range(30)), ConsistentObjective(), RECIPE,
                after_epoch=lambda epoch: told.append((epoch, gates["2"].outer.weight.sum().item())))  # fmt: skip
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert len({weight for _, weight in told}) == 3


def test_the_chance_of_a_coin_falls_from_start_to_end():
    schedule = EpsilonSchedule(start=0.9, end=0.1, decay=10)
    assert schedule.at(0) == 0.9
    assert schedule.at(10) == pytest.approx(0.1 + 0.8 / math.e)
    assert schedule.at(10_000) == pytest.approx(0.1)


def test_cached_states_are_each_rows_own_whatever_its_length_and_batch(tiny_model, rows):
    model, data = tiny_model(exit_gate="mlp+logits"), rows(25, seed=3)
    cached = collect_states(model, data, max_batch_tokens=24, progress=False)
    with torch.inference_mode():
        alone = [model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False) for row in data]
    assert cached.states.shape == (25, 3, 32)
    assert torch.allclose(cached.trace.logits, torch.cat([output.exit_logits for output in alone]), atol=1e-5)
    gates = torch.cat([output.exit_scalars["gate"] for output in alone])
    assert torch.allclose(cached.gate_logits(model.exit_gates), gates, atol=1e-4)
    assert cached.trace.labels.tolist() == data["labels"][:]
    assert len({len(row["input_ids"]) for row in data}) > 5
