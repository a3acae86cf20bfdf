"""Every argument that a run of phases is given works, or is refused by name before the first phase."""

import inspect
import pathlib

import pytest
import torch
from transformers import Trainer

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, TrainingError, UnknownNameError, UsageError
from hf_earlyexit.training.consistent import WHY_NOT, WHY_NOT_IN_TRAIN, ConsistentTrainer
from hf_earlyexit.training.consistent_arguments import NO_PLACE

from . import consistent_script as script

LEARNED = {"exits_trained": True, "gate_epochs": 1}


@pytest.fixture
def trainer(tmp_path):
    """`trainer(rows=, eval_dataset=, **settings)`: a run that is ready; arguments of the trainer itself by `given`."""

    def make(rows=None, given=None, model=None, **settings):
        given = {**script.COLLATOR, **(given or {})}
        return ConsistentTrainer(
            model or script.make_model(),
            script.make_args(tmp_path / "run", **settings),
            rows or script.make_rows(24),
            **given,
        )

    return make


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- arguments of the trainer -------------------------------------------------------------------------------------------


def test_every_argument_of_trainer_is_taken_or_refused():
    takes = {name for name, part in inspect.signature(ConsistentTrainer).parameters.items() if part.kind != part.VAR_KEYWORD}
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} - takes == set(WHY_NOT)


@pytest.mark.parametrize("name", WHY_NOT)
def test_what_phases_have_no_place_for_is_refused_by_name(trainer, name):
    with pytest.raises(TrainingError, match=f"{name} cannot be used here") as caught:
        trainer(given={name: lambda *_: None})
    assert caught.value.field == name
    trainer(given={name: (None, None) if name == "optimizers" else None})  # what Trainer itself has by default


def test_a_name_that_means_nothing_comes_with_a_suggestion(trainer):
    with pytest.raises(
        UnknownNameError, match=r"Unknown argument of ConsistentTrainer 'gate_data'. Did you mean 'gate_dataset'"
    ):
        trainer(given={"gate_data": script.make_rows(4)})
    with pytest.raises(UnknownNameError, match=r"Unknown argument of Trainer 'eval_data'. Did you mean 'eval_dataset'"):
        ee.EarlyExitTrainer(script.make_model(), script.make_args("run"), eval_data=script.make_rows(4))


def test_metrics_of_ones_own_are_logged_in_both_phases_that_train_exits(trainer):
    seen = []

    def shortened(logits, labels):
        seen.append(logits.shape)
        return logits[:, :2]

    given = {
        "eval_dataset": script.make_rows(16, seed=1),
        "compute_metrics": lambda prediction: {"width": prediction.predictions.shape[1]},
        "preprocess_logits_for_metrics": shortened,
    }
    logs = trainer(given=given, eval_strategy="epoch").train()
    assert [log["phase"] for log in logs if log.get("eval_width") == 2] == ["01-exits", "04-chosen"]
    assert set(seen) == {(8, 3)}


def test_a_checkpoint_by_name_is_refused(trainer):
    with pytest.raises(UsageError, match=r"resume_from_checkpoint is 'run/checkpoint-2'; expected True"):
        trainer().train(resume_from_checkpoint="run/checkpoint-2")


def test_every_argument_of_train_is_taken_or_refused_by_name(trainer):
    known = list(inspect.signature(Trainer.train).parameters)
    assert list(inspect.signature(ConsistentTrainer.train).parameters) == known
    run = trainer()
    for name, value in (("trial", {"alpha": 0.1}), ("ignore_keys_for_eval", ["hidden_states"])):
        with pytest.raises(TrainingError, match=f"{name}=.* cannot be used here: {WHY_NOT_IN_TRAIN[name]}") as caught:
            run.train(**{name: value})
        assert caught.value.field == name
    assert set(WHY_NOT_IN_TRAIN) == set(known) - {"self", "resume_from_checkpoint"}
    assert not (run.args.output_dir and list(pathlib.Path(run.args.output_dir).glob("*"))), "nothing has begun"


def test_the_page_lists_what_is_refused():
    page = (pathlib.Path(__file__).parents[2] / "docs/how-to/consistentee.md").read_text()
    section = page.split("## What a run refuses")[1].split("\n## ")[0]
    refused = {*WHY_NOT, *WHY_NOT_IN_TRAIN, *NO_PLACE}
    assert {name for name in refused if f"`{name}`" not in section} == set()


# --- training arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [("label_smoothing_factor", 0.1), ("push_to_hub", True)])
def test_training_arguments_that_phases_would_drop_are_refused(tmp_path, name, value):
    with pytest.raises(TrainingError, match=f"{name}={value} cannot be used here") as caught:
        script.make_args(tmp_path, **{name: value})
    assert caught.value.field == name


def test_settings_that_suit_no_model_with_exits_are_refused_before_hardness_is_measured(trainer):
    with pytest.raises(TrainingError, match="neftune_noise_alpha=5 cannot be used here"):
        trainer(neftune_noise_alpha=5, objective="two-stage", **LEARNED)


def test_the_column_of_labels_may_have_any_name_in_every_phase(trainer, tmp_path):
    rows = script.make_rows(24)
    plain = trainer(rows)
    plain.train()
    named = rows.rename_column("labels", "target").add_column("label", [0] * 24)  # the named column counts
    args = script.make_args(tmp_path / "other", label_names=["target"])
    other = ConsistentTrainer(script.make_model(), args, named, **script.COLLATOR)
    other.train()
    first, second = state(plain.model), state(other.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "gate_dataset"])
def test_a_row_without_label_is_refused_before_the_first_phase(trainer, which):
    def with_labels(labels):
        rows = script.make_rows(4, first_id=100).remove_columns("labels")
        rows = rows if labels is None else rows.add_column("labels", labels)
        return trainer(rows) if which == "train_dataset" else trainer(given={which: rows})

    with pytest.raises(DataError, match=f"Row 2 of {which} has label -100"):
        with_labels([0, 1, -100, 2])
    with pytest.raises(DataError, match=f"Row 3 of {which} has label 7"):
        with_labels([0, 1, 1, 7])
    with pytest.raises(DataError, match=f"{which} has no column of labels among input_ids, idx; expected labels or"):
        with_labels(None)
    with_labels([0, 1, 1, 2])


@pytest.mark.parametrize(
    "rows", [script.make_rows(4).to_iterable_dataset(), list(script.make_rows(4)), {"all": script.make_rows(4)}], ids=type
)
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset", "gate_dataset"])
def test_what_is_not_one_data_set_is_refused(trainer, rows, which):
    with pytest.raises(DataError, match=f"{which} is .*; expected one datasets.Dataset"):
        trainer(rows) if which == "train_dataset" else trainer(given={which: rows})


def test_no_rows_are_refused(trainer):
    with pytest.raises(DataError, match="eval_dataset has no rows"):
        trainer(given={"eval_dataset": script.make_rows(4).select([])})


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_formatted_rows_train_as_plain_ones(trainer, tmp_path, kind):
    rows = script.make_rows(24)
    plain = trainer(rows, **LEARNED)
    plain.train()
    args = script.make_args(tmp_path / "other", **LEARNED)
    other = ConsistentTrainer(script.make_model(), args, rows.with_format(kind), **script.COLLATOR)
    other.train()
    first, second = state(plain.model), state(other.model)
    assert other.train_ids == plain.train_ids
    assert all(torch.equal(first[name], second[name]) for name in first)
