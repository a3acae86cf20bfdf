"""Exits learned by reward: one run of all phases, told in the log, the same after any interruption."""

import json
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, DataError, TrainingError, UnknownNameError, UsageError
from hf_earlyexit.training.consistent import ConsistentTrainer
from tests.processes import started

from . import consistent_script as script


@pytest.fixture
def trainer(tmp_path):
    """`trainer(folder="run", **settings)`: a short run of all phases."""

    def make(folder="run", model=None, rows=None, eval_rows=True, **settings):
        kept = {name: settings.pop(name) for name in ("gate_dataset", "hardness_table", "callbacks") if name in settings}
        return ConsistentTrainer(
            model or script.make_model(),
            script.make_args(tmp_path / folder, **{"save_strategy": "no", **settings}),
            rows or script.make_rows(48),
            script.make_rows(40, seed=1) if eval_rows else None,
            **kept,
            **script.COLLATOR,
        )

    return make


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def changed(before, after):
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --- the phases ---------------------------------------------------------------------------------------------------------


def test_one_run_goes_through_all_phases_and_tells_of_each(trainer, tmp_path):
    run = trainer(rounds=2)
    logs = run.train()
    names = ["01-exits", "02-hardness", "03-gates", "04-chosen", "05-gates", "06-chosen"]
    assert [phase.folder for phase in run.phases] == names
    assert list(dict.fromkeys(log["phase"] for log in logs)) == names
    for name in names:
        last = [log for log in logs if log["phase"] == name][-1]
        assert {"gate_quality", "gate_layers", "gate_reward", *(f"exit_{n}_quality" for n in (1, 2, 3, 4))} <= set(last)
        assert sum(last[f"exit_{n}_share"] for n in (1, 2, 3, 4)) == pytest.approx(1)
        assert (tmp_path / "run" / name / "done.json").is_file()
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    run.save_model()
    again = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "run")
    assert same(state(again), state(run.model))


def test_each_phase_changes_what_it_should(trainer, tmp_path):
    run = trainer()
    start = state(run.model)
    run.train()
    after = [load_file(tmp_path / "run" / phase.folder / "model" / "model.safetensors") for phase in run.phases]
    network = {"bert", "exit_heads", "classifier"}
    assert changed(start, after[0]) == network
    assert changed(after[0], after[1]) == set()
    assert changed(after[1], after[2]) == {"exit_gates"}
    assert changed(after[2], after[3]) == network


def test_the_joint_phase_trains_gates_and_network_by_one_loss(trainer, tmp_path):
    run = trainer(chosen_phase="joint", estimator="exact")
    run.train()
    before, after = (load_file(tmp_path / "run" / p.folder / "model" / "model.safetensors") for p in run.phases[-2:])
    assert changed(before, after) == {"bert", "exit_heads", "exit_gates", "classifier"}


def test_trained_exits_and_the_last_phase_can_be_left_out(trainer):
    run = trainer(exits_trained=True, chosen_epochs=0)
    before = state(run.model)
    run.train()
    assert [phase.kind for phase in run.phases] == ["hardness", "gates"]
    assert changed(before, state(run.model)) == {"exit_gates"}


@pytest.mark.parametrize("estimator", ["exact", "reinforce"])
def test_gates_learn_to_earn_more(trainer, estimator):
    run = trainer(rows=script.make_rows(300), chosen_epochs=0, gate_epochs=12, gate_learning_rate=3e-3, alpha=0.2,
                  num_train_epochs=6, learning_rate=5e-3, estimator=estimator)  # fmt: skip
    logs = run.train()
    first, last = (next(log for log in order if log["phase"] == "03-gates") for order in (logs, logs[::-1]))
    start = [log for log in logs if log["phase"] == "02-hardness"][-1]
    assert last["gate_reward"] > start["gate_reward"]
    assert last["gate_reward"] >= first["gate_reward"] - 0.01
    assert last["gate_layers"] < 4


def test_a_dearer_layer_lets_rows_leave_earlier(trainer):
    layers = []
    for number, alpha in enumerate((0.0, 1.0)):
        run = trainer(f"run-{number}", exits_trained=True, chosen_epochs=0, gate_epochs=30, gate_learning_rate=3e-3,
                      alpha=alpha, hardness="none", estimator="exact")  # fmt: skip
        layers.append(run.train()[-1]["gate_layers"])
    assert layers[1] < 1.2 < layers[0]


def test_gates_do_not_depend_on_the_order_of_the_rows(trainer):
    rows, models = script.make_rows(48), []
    for folder, data in (("straight", rows), ("shuffled", rows.shuffle(seed=3))):
        run = trainer(folder, rows=data, exits_trained=True, chosen_epochs=0, max_gate_rows=30)
        run.train()
        models.append(state(run.model))
    apart = max((models[0][name] - models[1][name]).abs().max().item() for name in models[0])
    assert apart < 1e-5  # padding differs with the neighbours, so not to the bit


def test_the_hardness_table_is_kept_and_told(trainer, tmp_path):
    run = trainer()
    logs = run.train()
    table = ee.training.HardnessTable.load(tmp_path / "run" / "02-hardness" / "hardness.safetensors")
    table.require_exactly(run.train_ids)
    assert torch.equal(table.layers, run.hardness_table.layers)
    told = next(log for log in logs if "hardness" in log)
    assert sum(v for k, v in told.items() if k.startswith("hardness_")) == pytest.approx(1)


def test_gates_can_learn_from_rows_held_back(trainer):
    apart = script.make_rows(24, seed=5, first_id=1000)
    run = trainer(gate_dataset=apart)
    run.train()
    run.hardness_table.require_exactly([*run.train_ids, *run.gate_ids])
    with pytest.raises(DataError, match="share ids"):
        trainer("other", gate_dataset=script.make_rows(24, seed=5))


def test_a_given_hardness_table_stands_in_for_the_measurement(trainer):
    ids = script.make_rows(48)["idx"][:]
    given = ee.training.HardnessTable(ids=tuple(ids), layers=torch.arange(48.0) % 4 + 1, num_layers=4)
    run = trainer(hardness_table=given)
    run.train()
    assert torch.equal(run.hardness_table.of(ids), given.layers)
    with pytest.raises(DataError, match="not in the hardness table"):
        trainer("other", hardness_table=ee.training.HardnessTable(ids=(1,), layers=torch.ones(1), num_layers=4))


def test_a_collapse_is_warned_of(trainer, caplog):
    run = trainer(exits_trained=True, chosen_epochs=0, alpha=5.0, hardness="none", gate_epochs=30, gate_learning_rate=3e-3)
    run.train()
    assert "more than 95% of the rows out after layer 1, twice in a row" in caplog.text


# --- what cannot work ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "bad"),
    [("alpha", -0.1), ("rollouts", 0), ("action", "best"), ("chosen_phase", "both"), ("rounds", 0), ("gate_epochs", 0),
     ("gate_learning_rate", 0.0), ("chosen_epochs", -1), ("epsilon_start", 2.0), ("epsilon_decay", 0.0)],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_at_set_up(tmp_path, field, bad):
    with pytest.raises(TrainingError) as caught:
        script.make_args(tmp_path, **{field: bad})
    assert caught.value.field in (field, field.removeprefix("gate_"))


@pytest.mark.parametrize(("field", "bad"), [("estimator", "exakt"), ("hardness", "memory")])
def test_misspelt_names_come_with_a_suggestion(tmp_path, field, bad):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        script.make_args(tmp_path, **{field: bad})


def test_a_model_without_gates_is_refused(trainer):
    with pytest.raises(TrainingError, match="no gates to train; load it with at least two exits and exit_gate='mlp'"):
        trainer(model=script.make_model(exit_gate=None))


def test_rows_without_ids_or_with_doubled_ones_are_refused(trainer):
    rows = script.make_rows(8)
    with pytest.raises(DataError, match=r"No column 'idx' among .*rows.add_column\('idx', range"):
        trainer(rows=rows.remove_columns("idx"))
    with pytest.raises(DataError, match="comes twice"):
        trainer(rows=rows.remove_columns("idx").add_column("idx", [1] * 8))


def test_a_folder_that_holds_a_run_is_not_overwritten(trainer):
    trainer().train()
    with pytest.raises(UsageError, match="holds a run; take it up with resume_from_checkpoint=True"):
        trainer().train()
    with pytest.raises(TrainingError, match=r"was started with alpha=0\.1, now it is 0\.2"):
        trainer(alpha=0.2).train(resume_from_checkpoint=True)


# --- interruption -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Weights and log of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    script.run(folder / "run")
    return load_file(folder / "run" / "model.safetensors"), json.loads((folder / "log.json").read_text()), folder / "run"


def timeless(log):
    return [{k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))} for entry in log]


def test_a_run_taken_up_after_any_phase_ends_the_same(straight, tmp_path):
    weights, log, folder = straight
    for done in range(5):
        target = tmp_path / str(done) / "run"
        target.parent.mkdir()
        shutil.copytree(folder, target)
        for phase in sorted(target.glob("0*"))[done:]:
            shutil.rmtree(phase)
        script.run(target)
        assert same(weights, load_file(target / "model.safetensors")), f"taken up after {done} phases"
        assert timeless(json.loads((target.parent / "log.json").read_text())) == timeless(log)


def test_a_torn_checkpoint_is_passed_over_with_a_warning(straight, tmp_path, caplog):
    weights, _, folder = straight
    target = tmp_path / "run"
    shutil.copytree(folder, target)
    for phase in sorted(target.glob("0*"))[1:]:
        shutil.rmtree(phase)
    (target / "01-exits" / "done.json").unlink()
    newest = max((target / "01-exits").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    script.run(target)
    assert f"{newest} was cut off while it was written" in caplog.text
    assert same(weights, load_file(target / "model.safetensors"))


def test_a_damaged_phase_is_an_error(straight, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(straight[2], target)
    file = target / "03-gates" / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="says it is done, but model"):
        script.run(target)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", ["01-exits/checkpoint-4", "01-exits/done.json", "03-gates/model", "04-chosen/checkpoint-2"]
)
def test_a_killed_run_ends_the_same(straight, tmp_path, moment):
    weights, _, _ = straight
    target = tmp_path / "run"
    process = started(script.run, target)
    deadline = time.monotonic() + 120
    while not (target / moment).exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run was over before it was killed"
    assert not (target / "model.safetensors").exists()
    script.run(target)
    assert same(weights, load_file(target / "model.safetensors"))
