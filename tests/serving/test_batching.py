"""From rows of many kinds to padded batches of similar length."""

from functools import wraps

import pytest
import torch
from datasets import Dataset

from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.serving.batching import evaluating, pad_batch, sorted_batches
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.tables import text_columns


def ids(*lengths):
    return [{"input_ids": list(range(5, 5 + length)), "attention_mask": [1] * length} for length in lengths]


def test_texts_are_encoded_as_the_tokenizer_encodes_them(tokenizer):
    encoded = encode_rows(["w5 w6 w7", "w8"], tokenizer)
    assert encoded == [dict(tokenizer("w5 w6 w7")), dict(tokenizer("w8"))]


def test_pairs_are_encoded_as_pairs(tokenizer):
    expected = [dict(tokenizer("w5 w6", "w7")), dict(tokenizer("w8", "w9 w10"))]
    assert encode_rows([("w5 w6", "w7"), ("w8", "w9 w10")], tokenizer) == expected
    assert encode_rows([["w5 w6", "w7"], ["w8", "w9 w10"]], tokenizer) == expected
    rows = Dataset.from_dict({"sentence1": ["w5 w6", "w8"], "sentence2": ["w7", "w9 w10"], "label": [0, 1]})
    assert encode_rows(rows, tokenizer) == expected
    assert sum(expected[0]["token_type_ids"]) == 2


def test_data_sets_of_texts_and_of_ids_give_the_same(tokenizer):
    rows = Dataset.from_dict({"sentence": ["w5 w6", "w7"], "idx": [0, 1]})
    with_ids = rows.map(lambda row: tokenizer(row["sentence"]))
    assert encode_rows(with_ids, None) == encode_rows(rows, tokenizer) == encode_rows(["w5 w6", "w7"], tokenizer)


def test_texts_without_tokenizer_are_refused_with_the_way_out():
    with pytest.raises(UsageError, match="Texts need a tokenizer: pass tokenizer=") as caught:
        encode_rows(["w5"], None)
    assert caught.value.field == "tokenizer"


def test_a_data_set_without_texts_is_refused_with_its_columns(tokenizer):
    with pytest.raises(DataError, match="No text column among body, label; expected one of text, sentence"):
        encode_rows(Dataset.from_dict({"body": ["w5"], "label": [0]}), tokenizer)


@pytest.mark.parametrize("rows", [[{"words": "w5", "label": 0}], [("w5", "w6", "w7")], [5, 6], [None]])
def test_rows_that_are_neither_texts_nor_pairs_are_refused(tokenizer, rows):
    with pytest.raises((DataError, UsageError), match="text"):
        encode_rows(rows, tokenizer)


def test_the_longest_match_of_text_columns_wins():
    assert text_columns(["idx", "question", "sentence", "label"]) == ("question", "sentence")
    assert text_columns(["text", "label"]) == ("text",)
    assert text_columns(["premise", "hypothesis"]) == ("premise", "hypothesis")


def test_long_texts_are_cut_at_the_limit(tokenizer):
    long = " ".join(["w5"] * 200)
    assert len(encode_rows([long], tokenizer)[0]["input_ids"]) == 64
    assert len(encode_rows([long], tokenizer, max_length=10)[0]["input_ids"]) == 10


def test_no_texts_give_no_rows(tokenizer):
    assert encode_rows([], tokenizer) == []


@pytest.mark.parametrize("budget", [1, 7, 24, 1000])
def test_batches_keep_the_budget_and_hold_every_row_once(budget):
    lengths = torch.randint(1, 20, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    rows, seen = ids(*lengths), []
    for indices, batch in sorted_batches(rows, budget):
        width = batch["input_ids"].shape[1]
        assert width * len(indices) <= budget or len(indices) == 1
        assert width == max(lengths[index] for index in indices)
        for place, index in enumerate(indices):
            assert batch["input_ids"][place, : lengths[index]].tolist() == rows[index]["input_ids"]
            assert batch["attention_mask"][place].tolist() == [1] * lengths[index] + [0] * (width - lengths[index])
        seen += indices
    assert sorted(seen) == list(range(50))
    assert [lengths[index] for index in seen] == sorted(lengths, reverse=True)


def test_padding_has_the_token_that_is_given():
    (_, batch), *_ = sorted_batches(ids(3, 1), 100, 3)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 3, 3]]


def test_a_batch_is_padded_on_the_right_in_every_column():
    rows = [{"input_ids": [5, 6], "token_type_ids": [0, 1]}, {"input_ids": [7], "token_type_ids": [1]}]
    batch = pad_batch(rows, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize("apart", [False, True])
def test_a_view_evaluates_and_nothing_is_written_on_the_model(tiny_model, random_batch, apart):
    model, batch = tiny_model(), random_batch(8)
    assert evaluating(model) is model
    expected = model(**batch, early_exit=False).exit_logits
    # one of them frozen by hand, or the only one that trains
    modes = {name: (name == "classifier") == apart for name, _ in model.named_modules()}
    for name, module in model.named_modules():
        module.training = modes[name]
    view = evaluating(model)
    assert torch.equal(view(**batch, early_exit=False).exit_logits, expected)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module.training for module in view.modules())
    assert all(one is other for one, other in zip(view.parameters(), model.parameters(), strict=True))


def test_a_view_runs_the_hooks_of_the_model_and_keeps_its_own(tiny_model, random_batch):
    model, seen = tiny_model().train(), []
    model.bert.encoder.layer[1].register_forward_hook(lambda *call: seen.append("model"))
    view = evaluating(model)
    view.bert.encoder.layer[1].register_forward_hook(lambda *call: seen.append("view"))
    view(**random_batch(2), early_exit=False)
    assert seen == ["model", "view"]
    model(**random_batch(2))
    assert seen == ["model", "view", "model"]


def test_a_module_that_came_twice_comes_twice_in_the_view(tiny_model):
    model = tiny_model().train()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    layers = evaluating(model).bert.encoder.layer
    assert layers[1] is layers[0]
    assert layers[0] is not model.bert.encoder.layer[0]


def test_a_forward_that_knows_the_models_own_mode_is_refused(tiny_model):
    model = tiny_model().train()
    known = model.bert.forward
    model.bert.forward = wraps(known)(lambda *given, **named: known(*given, **named))
    with pytest.raises(UsageError, match=r"BertModel has been given another forward.*call model.eval\(\) first"):
        evaluating(model)
    assert evaluating(model.eval()) is model


def test_a_forward_that_was_put_back_is_that_of_the_class(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(4)
    expected = model(**batch, early_exit=False).exit_logits
    model.train().bert.forward = model.bert.forward
    assert torch.equal(evaluating(model)(**batch, early_exit=False).exit_logits, expected)


def test_code_compiled_in_place_is_passed_by_in_training_mode(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(4)
    expected = model(**batch, early_exit=False).exit_logits
    model.train().compile(backend="eager")
    assert torch.equal(evaluating(model)(**batch, early_exit=False).exit_logits, expected)
