"""Gates of a language model learn by reward: each token has a hardness, a price and an exit of its own."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError
from hf_earlyexit.losses import ConsistentObjective
from hf_earlyexit.losses.consistentee import exit_log_probabilities
from hf_earlyexit.losses.noise import row_keys
from hf_earlyexit.modeling.gates import GATES
from hf_earlyexit.training.chosen import HARDNESS_COLUMN, KEY_COLUMN, ChosenTokenTrainer
from hf_earlyexit.training.consistent_tokens import TokenLessons
from hf_earlyexit.training.gates import EpsilonSchedule, GateRecipe, train_gates
from hf_earlyexit.training.outcomes import Outcomes
from hf_earlyexit.training.states import TokenStates
from tests.generation.conftest import LAYERS, PAD, prompts

TEXTS = [
    {"idx": "a", "input_ids": [5, 9, 7, 20], "labels": [-100, -100, 7, 20]},
    {"idx": "b", "input_ids": [6, 8, 30, 11, 41, 17], "labels": [6, 8, 30, -100, 41, 17]},
    {"idx": "c", "input_ids": [12, 13], "labels": [12, 13]},
]
IDS = ["a:1", "a:2", "b:0", "b:1", "b:3", "b:4", "c:0"]


@pytest.fixture
def settings(tmp_path):
    """`settings(folder="run", **fields)`: of a short run."""

    def make(folder="run", **fields):
        usual = {
            "output_dir": str(tmp_path / folder), "alpha": 0.3, "max_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 5e-3, "chosen_learning_rate": 5e-3, "gate_epochs": 6, "gate_learning_rate": 1e-2,
            "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        }  # fmt: skip
        return ee.ConsistentTrainingArguments(**{**usual, **fields})

    return make


def own_texts(model, count, seed=2):
    """What the full model writes, greedily: its labels are the full model's own words."""
    rows = ee.generation.write_samples(
        model, prompts(count, 4, seed=seed)[0].tolist(), 16, max_new_tokens=12, pad_token_id=PAD
    )
    return Dataset.from_list([{"idx": place, **row} for place, row in enumerate(rows)])


def gated(writer, name="llama", **fields):
    return writer(name, exit_gate="linear", exit_head="tuned", **fields)


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_gates_find_the_exit_that_is_known_to_be_best(estimator):
    """What each exit knows stands in its state: tokens of three kinds, right from exit 0 on, from exit 1 on, or last."""
    kind = torch.arange(240) % 3
    states = torch.randn(240, 2, 6, generator=torch.Generator().manual_seed(0)) / 10
    right = torch.stack([kind == 0, kind <= 1, torch.ones(240, dtype=torch.bool)], 1)
    states[:, 0, 3], states[:, 1, 3] = right[:, 0] * 2.0 - 1, right[:, 1] * 2.0 - 1
    losses = torch.where(right, 0.1, 4.0)
    data = TokenStates(states=states, outcomes=Outcomes.of_tokens(losses, right, (2, 4, 6)))
    torch.manual_seed(0)
    gates = nn.ModuleDict({str(layer): GATES.get("linear")(6, 50) for layer in (2, 4)})
    objective = ConsistentObjective(alpha=0.2, estimator=estimator)
    train_gates(gates, data, torch.zeros(240), row_keys(range(240)), objective, GateRecipe(epochs=40, learning_rate=0.05))
    taken = torch.nn.functional.pad(data.gate_logits(gates) >= 0, (0, 1), value=True).int().argmax(1)
    assert torch.equal(taken, kind)
    seen = data.metrics(gates, objective, "none")
    assert (seen["gate_quality"], seen["gate_layers"]) == (1, pytest.approx(4))
    # rewards by hand: minus 0.1 minus 0.2 a layer, at layers 2, 4 and 6
    assert seen["gate_reward"] == pytest.approx(-(0.5 + 0.9 + 1.3) / 3)


def test_every_token_has_its_own_hardness(writer, settings):
    """Ids, losses and memorized layers, by hand from the exits' logits; prompts and padding are no tokens."""
    model = gated(writer)
    rows, lessons = Dataset.from_list(TEXTS), TokenLessons(model, settings(per_device_eval_batch_size=2), None)
    assert lessons.ids(rows) == tuple(IDS)
    expected, right, states = [], [], []
    for text in TEXTS:
        with torch.no_grad():
            output = model(torch.tensor([text["input_ids"]]), early_exit=False, output_hidden_states=True)
        for column, word in enumerate(text["labels"][1:]):
            if word != -100:
                logits = output.exit_logits[0, column]
                expected.append(-logits.log_softmax(-1)[:, word])
                right.append(logits.argmax(-1) == word)
                states.append(
                    torch.stack([model.model.norm(output.hidden_states[layer][0, column]) for layer in range(1, LAYERS)])
                )
    everything = lessons.outcomes(rows)
    assert torch.allclose(everything.losses, torch.stack(expected), atol=1e-5)
    assert torch.equal(everything.right, torch.stack(right))
    table = ee.training.HardnessTable.measured(everything, IDS)
    for layers, exits in zip(table.layers.tolist(), right, strict=True):
        steady = 0
        while steady < LAYERS and exits[LAYERS - 1 - steady]:
            steady += 1
        assert layers == min(LAYERS, LAYERS - steady + 1)
    places = torch.tensor([6, 0, 4])
    some = lessons.states(rows, places)
    assert torch.allclose(some.outcomes.losses, everything.losses[places], atol=1e-5)
    assert torch.allclose(some.states, torch.stack(states)[places], atol=1e-5)


def test_the_last_phase_weighs_each_token_by_its_chance_to_leave(writer, settings):
    model = gated(writer).train()
    rows = Dataset.from_list(TEXTS)
    lessons, hardness = TokenLessons(model, settings(), None), torch.arange(7) % 4 + 1.0
    rows = lessons.with_hardness(rows, hardness, row_keys(IDS))
    assert rows[1][HARDNESS_COLUMN] == [3, 4, 0, 1, 2, 0]
    assert rows[1][KEY_COLUMN][4] == int(row_keys(["b:4"]))
    for joint in (False, True):
        reward = ConsistentObjective(alpha=0.3, estimator="exact")
        trainer = ChosenTokenTrainer(
            objective=reward, teaches_gates=joint, epsilon=EpsilonSchedule(), seed=0, model=model, args=settings(),
            train_dataset=rows,
        )  # fmt: skip
        batch = trainer.data_collator([rows[place] for place in range(3)])
        loss = trainer.compute_loss(model, batch)
        total = torch.zeros(())
        for text, first in zip(TEXTS, (0, 2, 6), strict=True):
            output, token = model(torch.tensor([text["input_ids"]]), early_exit=False), first
            for column, word in enumerate(text["labels"][1:]):
                if word != -100:
                    losses = -output.exit_logits[0, column].log_softmax(-1)[:, word]
                    chance = exit_log_probabilities(output.exit_scalars["gate"][0, column]).exp()
                    price = 0.3 * (1 - hardness[token] / LAYERS) * torch.arange(1, LAYERS + 1)
                    total = total + (chance.detach() * losses).sum() + joint * (chance * (losses.detach() + price)).sum()
                    token += 1
        assert loss.item() == pytest.approx(total.item() / 7, rel=1e-4)
        loss.backward()
        assert any(weight.grad is not None for weight in model.exit_gates.parameters()) == joint
        model.zero_grad()


@pytest.fixture(scope="module")
def finished(writer, tmp_path_factory):
    """A finished run of all phases: the trainer, its texts, its folder, and its weights before."""
    folder = tmp_path_factory.mktemp("consistent")
    model = gated(writer)
    texts, before = own_texts(model, 24), {name: value.clone() for name, value in model.state_dict().items()}
    trainer = run(model, texts, folder)
    return trainer, texts, folder, before


def run(model, texts, folder, resume=False):
    arguments = ee.ConsistentTrainingArguments(
        str(folder), alpha=0.3, max_steps=8, per_device_train_batch_size=4, learning_rate=2e-2, chosen_epochs=0.5,
        chosen_learning_rate=1e-3, gate_epochs=10, gate_learning_rate=1e-2, objective="two-stage", save_strategy="no",
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = ee.ConsistentTrainer(model, arguments, texts, texts.remove_columns("idx"))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_one_run_goes_through_all_phases(finished):
    trainer, texts, folder, before = finished
    assert [phase.folder for phase in trainer.phases] == ["01-exits", "02-hardness", "03-gates", "04-chosen"]
    for phase in trainer.phases:
        last = [log for log in trainer.log_history if log["phase"] == phase.folder][-1]
        qualities = {f"exit_{n}_quality" for n in range(1, LAYERS + 1)}
        assert {"gate_quality", "gate_layers", "gate_reward"} | qualities <= set(last)
        assert last[f"exit_{LAYERS}_quality"] == 1, "labels are the full model's own words"
        assert sum(last[f"exit_{n}_share"] for n in range(1, LAYERS + 1)) == pytest.approx(1)
    reward = {log["phase"]: log["gate_reward"] for log in trainer.log_history if "gate_reward" in log}
    assert reward["03-gates"] > reward["02-hardness"]
    after = trainer.model.state_dict()
    moved = {name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"exit_heads", "exit_gates"}, "two-stage holds the network still in every phase"
    table = ee.training.HardnessTable.load(folder / "02-hardness" / "hardness.safetensors")
    table.require_exactly(trainer.train_ids)
    assert len(table.ids) == sum(label != -100 for row in texts for label in row["labels"])


def test_a_run_that_was_stopped_ends_the_same(finished, writer, tmp_path):
    trainer, texts, folder, _ = finished
    for done in (1, 3):
        target = tmp_path / str(done)
        shutil.copytree(folder, target)
        for phase in sorted(target.glob("0*"))[done:]:
            shutil.rmtree(phase)
        again = run(gated(writer), texts, target, resume=True)
        for name, value in trainer.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value), name


def test_learned_gates_leave_for_good_or_draft_without_loss(finished, tmp_path):
    """Saved and loaded; lossy tokens leave where the gate says one half, and lossless ids are the full model's."""
    trainer = finished[0]
    trainer.save_model(str(tmp_path))
    model = ee.from_pretrained(tmp_path, task="text-generation").eval()
    model.set_exit_policy(ee.policies.GatePolicy.half(LAYERS))
    ids, _ = prompts(6, 4, seed=9)
    options = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": PAD, "return_exit_layers": True}
    full = model.generate(ids, early_exit=False, **options)
    drafted = model.generate(ids, lossless=True, **options)
    assert torch.equal(drafted.sequences, full.sequences)
    counts = drafted.draft_counts
    assert 0 < sum(counts.accepted) <= sum(counts.drafted)
    left = model.generate(ids, **options).exit_layers
    assert set(left[:, 5:].unique().tolist()) & set(range(1, LAYERS)), "tokens leave"
    assert json.loads((tmp_path / "config.json").read_text())["exit_gate"] == "linear"


def test_what_cannot_be_learned_is_refused(writer, settings):
    model, rows = gated(writer), Dataset.from_list(TEXTS)
    for texts, words in (
        (TEXTS, "expected one datasets.Dataset"),
        (rows.remove_columns("idx"), "No column 'idx'"),
        (Dataset.from_list([{**TEXTS[0], "labels": [5, -100, -100, -100]}]), "nothing to learn"),
        (Dataset.from_list([TEXTS[0], TEXTS[0]]), "comes twice"),
    ):
        with pytest.raises(DataError, match=words):
            ee.ConsistentTrainer(model, settings(), texts)
    with pytest.raises(TrainingError, match="no gates"):
        ee.ConsistentTrainer(writer("llama"), settings(), rows)
