"""Answers for many rows, in the order they came."""

import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


def test_answers_keep_the_order_and_equal_single_rows(model, tokenizer, random_texts):
    texts = random_texts(40)
    answers = ee.predict(model, texts, tokenizer=tokenizer, max_batch_tokens=64)
    assert len(set(answers.exit_layer.tolist())) >= 3
    for row, text in enumerate(texts):
        with torch.inference_mode():
            alone = model(**tokenizer(text, return_tensors="pt"))
        assert int(alone.exit_layer) == int(answers.exit_layer[row])
        assert torch.allclose(alone.logits[0], answers.logits[row], atol=1e-5)
        assert torch.allclose(alone.exit_score[0], answers.exit_score[row], atol=1e-5)


def test_the_token_budget_changes_no_answer(model, tokenizer, random_texts):
    texts = random_texts(40, seed=1)
    small, large = (ee.predict(model, texts, tokenizer=tokenizer, max_batch_tokens=size) for size in (16, 4096))
    assert torch.equal(small.exit_layer, large.exit_layer)
    assert torch.allclose(small.logits, large.logits, atol=1e-5)


def test_the_full_model_can_be_asked_for(model, tokenizer, random_texts):
    answers = ee.predict(model, random_texts(8), tokenizer=tokenizer, early_exit=False)
    assert answers.exit_layer.tolist() == [4] * 8
    assert bool(answers.exit_score.isnan().all())


def test_no_rows_give_no_answers(model, tokenizer):
    answers = ee.predict(model, [], tokenizer=tokenizer)
    assert (answers.logits.shape, answers.exit_layer.shape, answers.exit_score.shape) == ((0, 3), (0,), (0,))


def test_blank_texts_are_answered(model, tokenizer):
    assert bool(ee.predict(model, ["", " "], tokenizer=tokenizer).logits.isfinite().all())


def test_a_data_set_of_pairs_equals_a_list_of_pairs(model, tokenizer, random_texts):
    first, second = random_texts(6), random_texts(6, seed=9)
    rows = Dataset.from_dict({"sentence1": first, "sentence2": second})
    told = ee.predict(model, rows, tokenizer=tokenizer)
    pairs = ee.predict(model, list(zip(first, second, strict=True)), tokenizer=tokenizer)
    assert torch.equal(told.logits, pairs.logits)


def test_a_very_long_text_is_cut_to_what_the_model_takes(model, tokenizer):
    words = " ".join(["w7"] * 10_000)
    answers = ee.predict(model, [words, "w7"], tokenizer=tokenizer)
    cut = ee.predict(model, [" ".join(["w7"] * 62)], tokenizer=tokenizer)
    assert torch.allclose(answers.logits[0], cut.logits[0], atol=1e-5)


def test_training_mode_comes_back(tiny_model, tokenizer, random_texts):
    model = tiny_model().train()
    ee.predict(model, random_texts(2), tokenizer=tokenizer)
    assert model.training


def test_a_single_text_is_not_taken_for_its_letters(model, tokenizer):
    with pytest.raises(ee.EarlyExitError, match=r"pass \[text\]"):
        ee.predict(model, "w5 w6", tokenizer=tokenizer)
