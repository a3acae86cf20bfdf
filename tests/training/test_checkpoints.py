"""A checkpoint that is not whole is passed over, with the file named; one asked for by name is refused by file."""

import json
import shutil

import pytest
import torch
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError

OPTIMIZER, SCHEDULER, RNG, STATE, WEIGHTS = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "model.safetensors",
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_model, tokenizer):
    """`folder, weights`: a run of 6 steps with checkpoints at 2, 4 and 6, and the weights it ended with."""
    folder = tmp_path_factory.mktemp("straight")
    run = begin(folder, tiny_model(), tokenizer)
    run.train()
    return folder, {name: value.clone() for name, value in run.model.state_dict().items()}


def begin(folder, model, tokenizer, **fields):
    from .conftest import make_rows

    args = ee.EarlyExitTrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "max_steps": 6,
            "per_device_train_batch_size": 8,
            "lr_scheduler_type": "linear",
            **fields,
        }
    )
    return ee.EarlyExitTrainer(model, args, train_dataset=make_rows(32), processing_class=tokenizer)


@pytest.fixture
def broken(straight, tmp_path):
    """A copy of the run, cut down to checkpoints 2 and 4; the newer one is to be damaged."""
    target = tmp_path / "run"
    shutil.copytree(straight[0], target)
    shutil.rmtree(target / "checkpoint-6")
    return target


def halved(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def garbled(file):
    file.write_bytes(b"\x80\x02}q\x00garbage" * 40)


def a_list(file):
    if file.suffix == ".json":
        file.write_text("[]")
    else:
        torch.save([1, 2, 3], file)


def deleted(file):
    file.unlink()


def another_step(file):
    shutil.copy(file.parents[1] / "checkpoint-2" / file.name, file)


def unknown_fields(file):
    file.write_text(json.dumps({**json.loads(file.read_text()), "what_is_this": 1}))


def another_model(file):
    optimizer = torch.optim.AdamW(nn.Linear(3, 3).parameters())
    torch.save(optimizer.state_dict(), file)


def other_shapes(file):
    values = torch.load(file, weights_only=True)
    values["state"][0]["exp_avg"] = torch.zeros(7, 7)
    torch.save(values, file)


def swapped(file):
    shutil.copy(file.with_name(SCHEDULER if file.name == OPTIMIZER else OPTIMIZER), file)


def short_generator(file):
    values = torch.load(file, weights_only=False)
    torch.save({**values, "cpu": values["cpu"][:100]}, file)


DAMAGES = [
    *(
        (name, damage)
        for name in (OPTIMIZER, SCHEDULER, RNG, STATE, WEIGHTS)
        for damage in (halved, emptied, garbled, deleted)
    ),
    *((name, a_list) for name in (OPTIMIZER, SCHEDULER, RNG, STATE)),
    *((name, swapped) for name in (OPTIMIZER, SCHEDULER, RNG)),
    (STATE, another_step),
    (STATE, unknown_fields),
    (OPTIMIZER, another_model),
    (OPTIMIZER, other_shapes),
    (RNG, short_generator),
]
IDS = [f"{name}-{damage.__name__}" for name, damage in DAMAGES]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=IDS)
def test_a_damaged_file_sends_the_run_back_to_the_older_checkpoint(
    straight, broken, tiny_model, tokenizer, caplog, name, damage
):
    damage(broken / "checkpoint-4" / name)
    run = begin(broken, tiny_model(seed=9), tokenizer)
    assert run.newest_checkpoint() == broken / "checkpoint-2"
    assert str(broken / "checkpoint-4") in caplog.text
    assert ("weights" if damage is deleted and name == WEIGHTS else name) in caplog.text


def test_the_run_that_went_back_ends_with_the_straight_runs_weights(straight, broken, tiny_model, tokenizer):
    halved(broken / "checkpoint-4" / OPTIMIZER)
    run = begin(broken, tiny_model(seed=9), tokenizer)
    run.train(resume_from_checkpoint=True)
    after = run.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in straight[1].items())


def test_a_whole_checkpoint_is_taken_without_a_word(broken, tiny_model, tokenizer, caplog):
    assert begin(broken, tiny_model(), tokenizer).newest_checkpoint() == broken / "checkpoint-4"
    assert "older state" not in caplog.text


def test_the_state_of_frozen_parts_is_not_expected(tmp_path, tiny_model, tokenizer):
    begin(tmp_path, tiny_model(), tokenizer, objective="two-stage").train()
    run = begin(tmp_path, tiny_model(), tokenizer, objective="two-stage")
    assert run.newest_checkpoint() == tmp_path / "checkpoint-6"
    assert begin(tmp_path, tiny_model(), tokenizer).newest_checkpoint() is None  # trains more than that optimizer holds


@pytest.mark.parametrize(
    ("name", "damage"),
    [case for case in DAMAGES if case[1] is not deleted],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_checkpoint_asked_for_by_name_is_refused_by_file(broken, tiny_model, tokenizer, name, damage):
    damage(broken / "checkpoint-4" / name)
    run = begin(broken, tiny_model(), tokenizer)
    with pytest.raises(CheckpointError, match=name) as caught:
        run.train(resume_from_checkpoint=str(broken / "checkpoint-4"))
    assert caught.value.path == str(broken / "checkpoint-4")


def test_a_checkpoint_by_name_that_lacks_a_file_is_taken_with_a_warning(broken, tiny_model, tokenizer, caplog):
    (broken / "checkpoint-4" / RNG).unlink()
    run = begin(broken, tiny_model(), tokenizer)
    run.train(resume_from_checkpoint=str(broken / "checkpoint-4"))
    assert run.state.global_step == 6
    assert f"is not whole (no {RNG})" in caplog.text


def test_no_folder_of_that_name_is_an_error(tmp_path, tiny_model, tokenizer):
    with pytest.raises(CheckpointError, match="which is no folder"):
        begin(tmp_path, tiny_model(), tokenizer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_a_run_whose_checkpoints_are_all_damaged_is_an_error(broken, tiny_model, tokenizer):
    for folder in broken.glob("checkpoint-*"):
        emptied(folder / SCHEDULER)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        begin(broken, tiny_model(), tokenizer).train(resume_from_checkpoint=True)
