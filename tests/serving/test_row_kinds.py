"""Rows are taken as what they are, each by itself: on every path, whatever stands beside them."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.serving.rows import encode_window
from tests.conftest import VOCABULARY

GOOD = {"input_ids": [2, 5, 6, 3], "token_type_ids": [0, 0, 1, 1], "attention_mask": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_(0, 1)  # segments that matter
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    ee.export_onnx(model, folder, forms=["layers"])
    served = ee.OnnxClassifier.from_pretrained(folder, threads=1)
    served.config.exit_policy = model.config.exit_policy
    return served


def streamed(model, rows):
    answers = list(ee.stream(model, rows, window=max(len(rows), 1)))
    return torch.stack([answer.logits for answer in answers]), [answer.exit_layer for answer in answers]


def predicted(model, rows):
    answers = ee.predict(model, rows)
    return answers.logits, answers.exit_layer.tolist()


def traced(model, rows):
    trace = ee.collect_trace(model, rows, labels=[0] * len(rows), progress=False)
    return trace.logits.flatten(1), [0] * len(rows)


@st.composite
def rows_of_any_columns(draw):
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        length = draw(st.integers(1, 6))
        row = {"input_ids": draw(st.lists(st.integers(5, len(VOCABULARY) - 1), min_size=length, max_size=length))}
        if draw(st.booleans()):
            row["token_type_ids"] = draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
        if draw(st.booleans()):
            row["attention_mask"] = [1, *draw(st.lists(st.integers(0, 1), min_size=length - 1, max_size=length - 1))]
        rows.append(row)
    return rows


@pytest.mark.parametrize("path", [predicted, streamed, traced])
@pytest.mark.parametrize("kind", ["torch", "onnx"])
@settings(max_examples=15)
@given(rows=rows_of_any_columns())
def test_a_row_says_the_same_alone_and_beside_rows_with_other_columns(model, exported, path, kind, rows):
    served = model if kind == "torch" else exported
    together, layers = path(served, rows)
    for place, row in enumerate(rows):
        alone, layer = path(served, [row])
        assert (together[place] - alone[0]).abs().max() <= 1e-4
        assert layers[place] == layer[0]


def test_texts_and_ids_stand_side_by_side(model, tokenizer):
    ids = {"input_ids": tokenizer("w5 w6")["input_ids"]}
    answers = ee.predict(model, [("w5", "w6"), ids, "w5 w6"], tokenizer=tokenizer)
    alone = [ee.predict(model, [row], tokenizer=tokenizer).logits for row in (("w5", "w6"), ids, "w5 w6")]
    assert (answers.logits - torch.cat(alone)).abs().max() <= 1e-5
    assert (answers.logits[0] - answers.logits[1]).abs().max() > 1e-3


def test_a_text_without_tokenizer_fails_alone_in_its_slot(model):
    answers = ee.predict(model, ["w5", GOOD], errors="slot")
    assert list(answers.errors) == [0]
    assert "Row 0 is a text. Texts need a tokenizer" in str(answers.errors[0])
    with pytest.raises(UsageError, match="Row 1 is a text"):
        ee.predict(model, [GOOD, "w5"])


WRONG = {
    "range": [0, 9, 0, 0],
    "negative": [0, -1, 0, 0],
    "text": ["a", 1, 1, 1],
    "None": [None, 1, 1, 1],
    "nan": [float("nan"), 1, 1, 1],
    "infinite": [float("inf"), 1, 1, 1],
    "fraction": [0.5, 1, 1, 1],
    "huge": [10**400, 1, 1, 1],
    "nested": [[1], [1], [1], [1]],
    "two rows": torch.ones(2, 4, dtype=torch.long),
    "array of fractions": np.full(4, 0.5),
    "tensor of nan": torch.full((4,), torch.nan),
    "one number": 1,
    "one word": "1111",
    "a dict": {1: 1},
    "shorter": [1, 1, 1],
    "longer": [1, 1, 1, 1, 1],
    "complex": [1j, 1, 1, 1],
}


@pytest.mark.parametrize("column", ["input_ids", "token_type_ids", "attention_mask"])
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_a_wrong_column_costs_its_own_row_only(model, exported, column, name, kind):
    served, bad = (model if kind == "torch" else exported), {**GOOD, column: WRONG[name]}
    if (column, name) in (("input_ids", "range"),):
        bad = {**GOOD, column: [2, 10_000, 3, 4]}
    answers = ee.predict(served, [GOOD, bad, GOOD], errors="slot")
    assert list(answers.errors) == [1]
    assert str(answers.errors[1]).startswith("Row 1 has ")
    assert torch.equal(answers.logits[0], answers.logits[2])
    assert (answers.logits[0] - ee.predict(served, [GOOD]).logits[0]).abs().max() <= 1e-5
    assert [one.error is None for one in ee.stream(served, [GOOD, bad, GOOD], errors="slot")] == [True, False, True]
    for path in (predicted, streamed, traced):
        with pytest.raises(DataError, match="Row 1 has"):
            path(served, [GOOD, bad])


@pytest.mark.parametrize("column", ["position_ids", "inputs_embeds"])
def test_columns_that_would_change_the_answer_are_not_passed_over(model, column):
    for rows in ([{**GOOD, column: [0, 1, 2, 3]}], {"input_ids": [[5, 6]], column: [[1, 0]]}):
        with pytest.raises(DataError, match=f"Row 0 has {column}"):
            ee.predict(model, rows)


@pytest.mark.parametrize(
    "row",
    [
        {name: torch.tensor(values) for name, values in GOOD.items()},
        {name: np.array(values, dtype=np.int32) for name, values in GOOD.items()},
        {name: tuple(map(np.int64, values)) for name, values in GOOD.items()},
        {name: list(torch.tensor(values)) for name, values in GOOD.items()},
        {**GOOD, "attention_mask": torch.ones(4, dtype=torch.bool)},
        {**GOOD, "attention_mask": [True, 1.0, np.bool_(1), 1]},
        {**GOOD, "attention_mask": None, "labels": 1, "text": "w5"},
    ],
)
def test_numbers_of_any_make_are_the_same_row(model, row):
    assert encode_window([row], None)[0] in (GOOD, {name: GOOD[name] for name in ("input_ids", "token_type_ids")})
    assert torch.equal(ee.predict(model, [row]).logits, ee.predict(model, [GOOD]).logits)


@pytest.mark.parametrize("column", ["input_ids", "token_type_ids"])
def test_booleans_are_no_ids(model, column):
    with pytest.raises(DataError, match=f"Row 0 has {column} that cannot be read: it holds True"):
        ee.predict(model, [{**GOOD, column: [True, True, False, True]}])


TEXTS = ["w5 w6 w7", "w8", "w9 w10", "w11", "w12 w13"]


def with_labels(rows):
    return Dataset.from_dict({**rows, "label": [0, 1, 2, 0, 1]})


TABLES = {
    "lists of a tokenizer": lambda tokenizer: tokenizer(TEXTS),
    "padded lists": lambda tokenizer: tokenizer(TEXTS, padding=True),
    "padded tensors": lambda tokenizer: tokenizer(TEXTS, padding=True, return_tensors="pt"),
    "padded arrays": lambda tokenizer: tokenizer(TEXTS, padding=True, return_tensors="np"),
    "dict of texts": lambda tokenizer: {"text": TEXTS},
    "dict of ids": lambda tokenizer: dict(tokenizer(TEXTS)),
    "frame of texts": lambda tokenizer: pd.DataFrame({"text": TEXTS, "label": 0}, index=list("abcde")),
    "frame of ids": lambda tokenizer: pd.DataFrame(dict(tokenizer(TEXTS))),
    "series": lambda tokenizer: pd.Series(TEXTS),
    "array of texts": lambda tokenizer: np.array(TEXTS),
    "slice of a data set": lambda tokenizer: with_labels({"text": TEXTS})[:5],
    "generator": lambda tokenizer: (text for text in TEXTS),
    "arrow table": lambda tokenizer: with_labels({"text": TEXTS}).data.table,
    "streamed without columns": lambda tokenizer: with_labels({"text": TEXTS}).to_iterable_dataset().map(lambda row: row),
    "made when asked for": lambda tokenizer: with_labels({"body": TEXTS}).with_transform(
        lambda rows: tokenizer(rows["body"])
    ),
}
for form in ("torch", "numpy", "pandas", "arrow", None):
    TABLES[f"texts as {form}"] = lambda tokenizer, form=form: with_labels({"text": TEXTS}).with_format(form)
    TABLES[f"ids as {form}"] = lambda tokenizer, form=form: with_labels(dict(tokenizer(TEXTS))).with_format(form)


RECORDS = {
    "text": ([{"text": text, "label": 1} for text in TEXTS], TEXTS),
    "sentence": ([{"id": "a", "sentence": text} for text in TEXTS], TEXTS),
    "pair": ([{"text": text, "text_pair": "w9"} for text in TEXTS], [(text, "w9") for text in TEXTS]),
    "mixed": ([{"text": TEXTS[0]}, *TEXTS[1:]], TEXTS),
}


@pytest.mark.parametrize("name", RECORDS)
def test_rows_may_name_their_columns_one_by_one(model, tokenizer, name):
    rows, texts = RECORDS[name]
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    assert torch.equal(ee.predict(model, rows, tokenizer=tokenizer).logits, expected.logits)
    assert [
        answer.exit_layer for answer in ee.stream(model, iter(rows), tokenizer=tokenizer)
    ] == expected.exit_layer.tolist()
    labels = {"labels": [0] * len(rows), "progress": False, "tokenizer": tokenizer}
    assert torch.equal(ee.collect_trace(model, rows, **labels).logits, ee.collect_trace(model, texts, **labels).logits)
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        answer = engine.submit(rows[0]).result(30)
    assert answer.exit_layer == expected.exit_layer[0]
    with pytest.raises(DataError, match=r"Row 0 is \{'body': 'w5'\}; expected a text"):
        ee.predict(model, [{"body": "w5"}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "bert"}, "tokenizer is 'bert'; expected one that is loaded"),
        *(({"max_length": number}, f"max_length is {number!r}; expected a whole") for number in (0, -1, 2.5, "9", True)),
        *(({"max_batch_tokens": number}, f"max_batch_tokens is {number!r}; expected a whole") for number in (0, 8.0, "9")),
        *(({"layer_budget": number}, f"layer_budget is {number!r}; expected a whole") for number in (True, 1.5, "2")),
    ],
)
def test_options_of_another_kind_are_refused_in_words(model, tokenizer, options, words):
    for call in (ee.predict, lambda *rows, **given: list(ee.stream(*rows, **given))):
        with pytest.raises(UsageError, match=words):
            call(model, TEXTS, **{"tokenizer": tokenizer, **options})


@pytest.mark.parametrize("form", [torch.tensor, np.array, tuple], ids=["torch", "numpy", "tuple"])
def test_one_row_of_ids_may_have_any_form(model, tokenizer, form):
    ids = tokenizer(TEXTS)["input_ids"]
    together = ee.predict(model, [{"input_ids": row} for row in ids])
    for place, row in enumerate(ids):
        alone = ee.predict(model, [{"input_ids": form(row)}])
        assert torch.equal(alone.logits, ee.predict(model, [{"input_ids": row}]).logits)
        assert alone.exit_layer[0] == together.exit_layer[place]
        # not to the bit: products of few rows add in another order, in the stock model too
        assert (alone.logits[0] - together.logits[place]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_rows_and_not_the_names_of_their_columns(model, tokenizer, name):
    expected = ee.predict(model, TEXTS, tokenizer=tokenizer)
    answers = ee.predict(model, TABLES[name](tokenizer), tokenizer=tokenizer)
    assert torch.equal(answers.logits, expected.logits)
    streamed = list(ee.stream(model, TABLES[name](tokenizer), tokenizer=tokenizer, window=2))
    assert [answer.exit_layer for answer in streamed] == expected.exit_layer.tolist()
    trace = ee.collect_trace(model, TABLES[name](tokenizer), labels=[0] * 5, tokenizer=tokenizer, progress=False)
    expected = ee.collect_trace(model, TEXTS, labels=[0] * 5, tokenizer=tokenizer, progress=False)
    assert torch.equal(trace.logits, expected.logits)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"w5", r"pass \[text\]"),
        (None, "of type NoneType; expected a list of texts"),
        (5, "of type int"),
        ({"w5", "w6"}, "a set, which has no order"),
        (torch.ones(2, 3, dtype=torch.long), r"Tensor of shape \[2, 3\]; pass it with its name"),
        (np.ones(3, dtype=np.int64), r"ndarray of shape \[3\]"),
        ({"input_ids": [5, 6]}, r"one row's input_ids in place of a column"),
        ({"input_ids": torch.tensor([5, 6])}, r"pass \[row\]"),
        ({"text": "w5"}, r"one row's text in place of a column"),
        ({"body": ["w5"]}, "No text column among body"),
        (pd.DataFrame({"body": ["w5"]}), "No text column among body"),
        (DatasetDict(train=Dataset.from_dict({"text": ["w5"]})), r"splits \(train\); pass one, rows\['train'\]"),
        ({"input_ids": [[5], [6]], "attention_mask": [[1]]}, "input_ids has 2, attention_mask has 1"),
    ],
)
def test_what_holds_no_rows_is_refused_in_words(model, tokenizer, rows, words):
    for call in (
        lambda: ee.predict(model, rows, tokenizer=tokenizer, errors="slot"),
        lambda: list(ee.stream(model, rows, tokenizer=tokenizer, errors="slot")),
        lambda: ee.collect_trace(model, rows, labels=[0], tokenizer=tokenizer, progress=False),
    ):
        with pytest.raises((UsageError, DataError), match=words):
            call()


def test_cells_that_are_missing_are_columns_that_only_some_rows_have(model, tokenizer):
    frame = pd.DataFrame([GOOD, {"input_ids": [5, 6]}])
    expected = ee.predict(model, [GOOD, {"input_ids": [5, 6]}])
    assert torch.equal(ee.predict(model, frame).logits, expected.logits)
    assert torch.equal(ee.predict(model, Dataset.from_list([GOOD, {"input_ids": [5, 6]}])).logits, expected.logits)
    answers = ee.predict(model, pd.DataFrame({"text": ["w5", None, float("nan")]}), tokenizer=tokenizer, errors="slot")
    assert set(answers.errors) == {1, 2}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_answer_that_is_no_number_is_an_error_of_its_row(tiny_model, open_policy, tokenizer, value):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    expected = ee.predict(model, ["w5", "w7"], tokenizer=tokenizer)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[6] = value  # the word w6
    answers = ee.predict(model, ["w5", "w6", "w7"], tokenizer=tokenizer, errors="slot")
    assert "Row 1 has an answer that is not finite" in str(answers.errors[1])
    assert (list(answers.errors), answers.reason[1], int(answers.exit_layer[1])) == ([1], "error", 0)
    assert bool(answers.logits[1].isnan().all())
    assert (answers.logits[[0, 2]] - expected.logits).abs().max() <= 1e-5
    for call in (
        lambda: ee.predict(model, ["w5", "w6"], tokenizer=tokenizer),
        lambda: list(ee.stream(model, ["w5", "w6"], tokenizer=tokenizer)),
        lambda: ee.collect_trace(model, ["w5", "w6"], labels=[0, 1], tokenizer=tokenizer, progress=False),
    ):
        with pytest.raises(DataError, match="Row 1 has an answer that is not finite"):
            call()
    with pytest.raises(DataError, match="not finite"):
        ee.explain(model, "w6", tokenizer=tokenizer)


def test_threads_share_a_model_in_training_mode_and_its_mode_stays(tiny_model, open_policy, random_texts, tokenizer):
    model = tiny_model(hidden_dropout_prob=0.5)
    model.set_exit_policy(open_policy(model, "confidence"))
    texts = random_texts(12)
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    model.train()
    model.bert.encoder.layer[2].eval()
    modes = [module.training for module in model.modules()]

    def answer(_):
        answers = ee.predict(model, texts, tokenizer=tokenizer)
        return answers.exit_layer.tolist(), answers.logits, [module.training for module in model.modules()]

    with ThreadPoolExecutor(8) as pool:
        for layers, logits, seen in pool.map(answer, range(24)):
            assert layers == expected.exit_layer.tolist()
            assert (logits - expected.logits).abs().max() <= 1e-5
            assert seen == modes
    assert ee.explain(model, texts[0], tokenizer=tokenizer).exit_layer == int(expected.exit_layer[0])
    assert [module.training for module in model.modules()] == modes


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: torch.compile(model, backend="eager"),
        torch.nn.DataParallel,
        lambda model: get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_wrapped_models_answer_as_they_do_themselves(tiny_model, open_policy, random_texts, tokenizer, wrap, training):
    inner, texts = tiny_model(), random_texts(8)
    inner.set_exit_policy(open_policy(inner, "confidence"))
    wrapped = wrap(inner)
    with torch.no_grad():
        for name, weight in inner.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.5)  # adapters that matter
    with torch.inference_mode():
        full = wrapped.eval()(**tokenizer(texts, padding=True, return_tensors="pt"), early_exit=False).exit_logits
    wrapped.train(training)
    trace = ee.collect_trace(wrapped, texts, labels=[0] * 8, tokenizer=tokenizer, progress=False)
    assert (trace.logits - full).abs().max() <= 1e-5
    answers = ee.predict(wrapped, texts, tokenizer=tokenizer)
    assert len(set(answers.exit_layer.tolist())) > 1
    assert [one.exit_layer for one in ee.stream(wrapped, texts, tokenizer=tokenizer)] == answers.exit_layer.tolist()
    assert ee.explain(wrapped, texts[0], tokenizer=tokenizer).exit_layer == int(answers.exit_layer[0])


def test_models_that_classify_nothing_are_refused(tokenizer):
    for call in (ee.predict, ee.stream, lambda model, rows, tokenizer: ee.collect_trace(model, rows, tokenizer=tokenizer)):
        with pytest.raises(UsageError, match="Linear has no exits"):
            call(torch.nn.Linear(1, 1), ["w5"], tokenizer=tokenizer)
