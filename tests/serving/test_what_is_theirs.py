"""Rows keep what is theirs: their number in errors, the padding of the full pass, their memory after others left."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker


@pytest.fixture
def short_windows(monkeypatch):
    """Windows that are shorter than asked, as data sets that are read part by part give them; the fourth row is broken."""
    parts = [["w5"], ["w6", "w7"], [None, "w8"], ["w9"]]
    monkeypatch.setattr("hf_earlyexit.serving.reader.windows", lambda rows, size, columns: iter(parts))


def test_rows_are_told_by_their_number_after_short_windows(model, tokenizer, short_windows):
    with pytest.raises(DataError, match="Row 3 "):
        ee.predict(model, ["w5"], tokenizer=tokenizer)
    answers = ee.predict(model, ["w5"], tokenizer=tokenizer, errors="slot")
    assert list(answers.errors) == [3]
    assert str(answers.errors[3]).startswith("Row 3 ")
    assert [reason == "error" for reason in answers.reason] == [False, False, False, True, False, False]
    streamed = list(ee.stream(model, ["w5"], tokenizer=tokenizer, errors="slot"))
    assert [str(answer.error)[:6] for answer in streamed if answer.error is not None] == ["Row 3 "]


def test_ids_the_model_does_not_know_are_told_by_number_in_later_windows(model, monkeypatch):
    parts = [[{"input_ids": [5]}], [{"input_ids": [6]}, {"input_ids": [70_000]}]]
    monkeypatch.setattr("hf_earlyexit.serving.reader.windows", lambda rows, size, columns: iter(parts))
    answers = ee.predict(model, [1], errors="slot")
    assert {place: str(error)[:6] for place, error in answers.errors.items()} == {2: "Row 2 "}


def test_the_full_pass_keeps_its_padding(model, random_batch):
    """Who does not exit early gets the stock model's answers, from the very shapes that it computes with."""
    batch, shapes = random_batch(6), []
    last = model.bert.encoder.layer[1].output
    hook = last.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    closed = ee.ConfidencePolicy(thresholds=(None,) * 3).to_dict()
    opened = model.config.exit_policy
    try:
        with torch.inference_mode():
            model(**batch, early_exit=False)
            model.config.exit_policy = closed
            model(**batch)
    finally:
        hook.remove()
        model.config.exit_policy = opened
    assert shapes == [(6, 16, 32)] * 2


@pytest.mark.parametrize("name", ["beem-c", "patience"])
@pytest.mark.parametrize("lanes", [1, 3])
def test_a_closed_exit_is_heard_by_rules_with_memory(tiny_model, tokenizer, random_texts, open_policy, name, lanes):
    model, rows = tiny_model(), encode_rows(random_texts(120, longest=20), tokenizer)
    opened = open_policy(model, name)
    policy = opened.with_thresholds((None, opened.thresholds[1], opened.thresholds[2]))
    model.set_exit_policy(policy)
    got = Scheduler(ModelWalker(model), policy, 96, lanes=lanes).run(rows)
    deaf = type(policy).from_dict(policy.to_dict() | {"muted": [0]})
    other = Scheduler(ModelWalker(model), deaf, 96, lanes=lanes).run(rows)
    with torch.inference_mode():
        alone = [int(model(input_ids=torch.tensor([row["input_ids"]])).exit_layer) for row in rows]
    assert [model.exit_layers[index] for index in got.exit_index.tolist()] == alone
    assert not torch.equal(got.exit_index, other.exit_index)


def test_a_budget_ends_at_an_exit_in_use_and_counts_layers(tiny_model, tokenizer, random_texts):
    model, rows = tiny_model(exit_layers=[2, 3, 4]), encode_rows(random_texts(10), tokenizer)
    muted = ee.ConfidencePolicy(thresholds=(1.0, None), muted=(1,))
    got = Scheduler(ModelWalker(model), muted, 96, layer_budget=3).run(rows)
    assert set(got.exit_index.tolist()) == {0}  # after layer 2; the exit after layer 3 is muted
    got = Scheduler(ModelWalker(model), ee.ConfidencePolicy(thresholds=(1.0, 1.0)), 96, layer_budget=2).run(rows)
    assert set(got.exit_index.tolist()) == {0}
