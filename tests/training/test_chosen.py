"""The phases hand each other the right rows, hardness, seeds and noise, and each part learns from its own loss."""

from dataclasses import replace

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.base import row_losses
from hf_earlyexit.losses.noise import row_keys, row_noise
from hf_earlyexit.training import consistent
from hf_earlyexit.training.chosen import HARDNESS_COLUMN, KEY_COLUMN, ChosenExitTrainer
from hf_earlyexit.training.consistent import ConsistentTrainer
from hf_earlyexit.training.gates import EpsilonSchedule

from . import consistent_script as script

LAYERS = torch.arange(1.0, 5)


def table_out_of_order(ids):
    """A hardness of each id that no position gives away."""
    turned = list(ids)[::-1]
    return ee.training.HardnessTable(ids=tuple(turned), layers=torch.tensor([(7 * key) % 5 for key in turned]), num_layers=4)


@pytest.fixture
def seen(monkeypatch):
    """What `ConsistentTrainer` hands to its parts, by name; nothing is trained."""
    seen = {"gates": [], "chosen": [], "seeds": []}

    def train_gates(gates, data, hardness, keys, objective, recipe, epsilon, after_epoch):
        seen["gates"].append({"data": data, "hardness": hardness, "keys": keys, "recipe": recipe})
        after_epoch(1)

    def run_trainer(self, trainer, *_):
        seen["chosen"].append(trainer)
        return []

    monkeypatch.setattr(consistent, "train_gates", train_gates)
    monkeypatch.setattr(consistent, "set_seed", seen["seeds"].append)
    monkeypatch.setattr(ConsistentTrainer, "_run_trainer", run_trainer)
    return seen


def run(folder, rows, **settings):
    table = table_out_of_order(rows["idx"])
    args = script.make_args(folder / "run", **settings)
    trainer = ConsistentTrainer(script.make_model(), args, rows, hardness_table=table, **script.COLLATOR)
    trainer.train()
    return trainer, table


def test_gates_learn_from_each_rows_own_state_hardness_and_noise(seen, tmp_path):
    rows = script.make_rows(40, first_id=100)
    trainer, table = run(tmp_path, rows, exits_trained=True, chosen_epochs=0, max_gate_rows=15)
    given = seen["gates"][0]
    ids = {int(key): row_id for key, row_id in zip(row_keys(rows["idx"]), rows["idx"], strict=True)}
    chosen = [ids[int(key)] for key in given["keys"]]
    assert len(set(chosen)) == 15
    assert given["hardness"].tolist() == table.of(chosen).tolist()
    assert given["hardness"].tolist() != table.layers[:15].tolist()
    with torch.inference_mode():
        ids = torch.tensor(rows["input_ids"][:])[[row_id - 100 for row_id in chosen]]
        alone = trainer.model.eval()(input_ids=ids, early_exit=False).exit_logits
    assert torch.allclose(given["data"].trace.logits, alone, atol=1e-5)
    assert given["data"].trace.labels.tolist() == [rows["labels"][row_id - 100] for row_id in chosen]


@pytest.mark.parametrize("chosen_phase", ["joint", "alternate"])
def test_chosen_exits_learn_with_the_hardness_and_key_of_each_rows_id(seen, tmp_path, chosen_phase):
    rows = script.make_rows(40, first_id=100)
    _, table = run(tmp_path, rows, exits_trained=True, chosen_phase=chosen_phase)
    data = seen["chosen"][-1].train_dataset
    assert data[HARDNESS_COLUMN][:] == [(7 * key) % 5 for key in data["idx"]]
    assert data[HARDNESS_COLUMN][:] != table.layers.tolist()
    assert data[KEY_COLUMN][:] == row_keys(data["idx"][:]).tolist()


def test_every_phase_has_a_seed_of_its_own(seen, tmp_path):
    run(tmp_path, script.make_rows(16), rounds=2, seed=20)
    assert seen["seeds"] == [21, 22, 23, 24, 25, 26]
    assert [given["recipe"].seed for given in seen["gates"]] == [23, 25]
    assert [trainer.args.seed for trainer in seen["chosen"]] == [21, 24, 26]
    assert [trainer.rollout_seed for trainer in seen["chosen"][1:]] == [24, 26]


# --- one step of the phase of chosen exits ------------------------------------------------------------------------------


@pytest.fixture
def chosen(tmp_path):
    """`chosen(**settings)`: a `ChosenExitTrainer`, and a batch of it."""

    def make(objective=None, teaches_gates=True, epsilon=None, model=None, **settings):
        rows = script.make_rows(12)
        rows = rows.add_column(HARDNESS_COLUMN, [float(key % 5) for key in rows["idx"]])
        rows = rows.add_column(KEY_COLUMN, row_keys(rows["idx"][:]).tolist())
        trainer = ChosenExitTrainer(
            objective=objective or ConsistentObjective(alpha=0.3),
            teaches_gates=teaches_gates,
            epsilon=epsilon or EpsilonSchedule(),
            seed=9,
            model=model or script.make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            args=script.make_args(tmp_path / "chosen", **settings),
            train_dataset=rows,
            **script.COLLATOR,
        )
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make


def gradients(trainer, loss):
    trainer.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


def by_hand(trainer, batch, objective):
    """Value of the objective on a batch, from a plain forward."""
    outputs = trainer.model(input_ids=batch["input_ids"], early_exit=False)
    losses = row_losses(outputs.exit_logits, batch["labels"], "single_label_classification")
    noise = row_noise(batch[KEY_COLUMN], 9, trainer.state.global_step, (objective.rollouts, 3)) if objective.draws else None
    return objective(outputs.exit_scalars["gate"], losses, batch[HARDNESS_COLUMN], LAYERS, noise)


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_gates_learn_from_their_own_loss_alone_and_heads_from_the_exits_loss(chosen, estimator):
    objective = ConsistentObjective(alpha=0.3, estimator=estimator)
    trainer, batch = chosen(objective)
    found = gradients(trainer, trainer.compute_loss(trainer.model, dict(batch)))
    value = by_hand(trainer, batch, objective)
    both = gradients(trainer, value.gate_loss)
    gates = {name: gradient for name, gradient in both.items() if name.startswith("exit_gates.")}
    assert len(gates) == 12
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in gates.items())
    of_exits = gradients(trainer, by_hand(trainer, batch, objective).exit_loss)
    heads = {name: gradient for name, gradient in of_exits.items() if name.startswith(("exit_heads.", "classifier."))}
    assert heads
    assert all(torch.allclose(found[name], gradient, atol=1e-6) for name, gradient in heads.items())


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_gates_held_still_get_no_gradient_and_the_loss_is_the_exits(chosen, estimator):
    objective = ConsistentObjective(alpha=0.3, estimator=estimator)
    trainer, batch = chosen(objective, teaches_gates=False)
    assert not any(parameter.requires_grad for parameter in trainer.model.exit_gates.parameters())
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss.detach()) == pytest.approx(float(by_hand(trainer, batch, objective).exit_loss.detach()), abs=1e-6)
    assert not any(name.startswith("exit_gates.") for name in gradients(trainer, loss))


def test_each_step_draws_anew_and_a_row_draws_its_own(chosen, monkeypatch):
    drawn = []
    draw = ConsistentObjective.draw_exits
    monkeypatch.setattr(
        ConsistentObjective, "draw_exits", lambda self, gates, noise: (drawn.append(noise), draw(self, gates, noise))[1]
    )
    trainer, batch = chosen()
    for step in (0, 1, 2):
        trainer.state.global_step = step
        trainer.compute_loss(trainer.model, dict(batch))
    for step, noise in enumerate(drawn):
        assert torch.equal(noise, row_noise(batch[KEY_COLUMN], 9, step, (8, 3)))
    assert not torch.equal(drawn[0], drawn[1])


def test_the_coin_falls_with_the_steps(chosen):
    trainer, batch = chosen(epsilon=EpsilonSchedule(start=1.0, end=0.0, decay=1.0))
    losses = []
    for step in (0, 50):
        trainer.state.global_step = step
        objective = replace(ConsistentObjective(alpha=0.3), epsilon=trainer.epsilon.at(step))
        losses.append(float(trainer.compute_loss(trainer.model, dict(batch)).detach()))
        value = by_hand(trainer, batch, objective)
        assert losses[-1] == pytest.approx(float((value.exit_loss + value.gate_loss).detach()), abs=1e-5)
    assert losses[0] != losses[1]
