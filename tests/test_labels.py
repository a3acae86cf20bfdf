"""Labels of every form mean the same on every path, or are refused by row and column."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError
from hf_earlyexit.labels import label_problem_type, read_labels
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL, row_quality

NAMES = {"neg": 0, "neutral": 1, "pos": 2}


def config(num_labels=3, problem_type=None, label2id=NAMES):
    return SimpleNamespace(num_labels=num_labels, problem_type=problem_type, label2id=label2id)


CLASSES = {
    "list": [2, 0, 1],
    "tuple": (2, 0, 1),
    "int64": torch.tensor([2, 0, 1]),
    "int32": torch.tensor([2, 0, 1], dtype=torch.int32),
    "uint8": torch.tensor([2, 0, 1], dtype=torch.uint8),
    "numpy int16": np.array([2, 0, 1], dtype=np.int16),
    "numpy uint64": np.array([2, 0, 1], dtype=np.uint64),
    "big-endian": np.array([2, 0, 1], dtype=">i4"),
    "a column each": [[2], [0], [1]],
    "a column, tensor": torch.tensor([[2], [0], [1]]),
    "numpy numbers": [np.int64(2), np.int32(0), np.uint8(1)],
    "torch numbers": [torch.tensor(2), torch.tensor(0), torch.tensor(1)],
    "series": pd.Series([2, 0, 1]),
    "nullable series": pd.Series([2, 0, 1], dtype="Int64"),
    "names": ["pos", "neg", "neutral"],
    "names and numbers": ["pos", 0, "neutral"],
    "numpy names": np.array(["pos", "neg", "neutral"]),
    "column of a data set": Dataset.from_dict({"label": [2, 0, 1]})["label"],
    "read-only": np.frombuffer(np.array([2, 0, 1]).tobytes(), dtype=np.int64),
    "every other": np.array([2, 9, 0, 9, 1, 9])[::2],
}


@pytest.mark.parametrize("given", CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("problem_type", [None, SINGLE_LABEL])
def test_class_numbers_of_every_form_are_the_same_classes(given, problem_type):
    labels = read_labels(given, config(problem_type=problem_type))
    assert labels.values.dtype == torch.int64
    assert labels.values.tolist() == [2, 0, 1]
    assert labels.problem_type == SINGLE_LABEL


@pytest.mark.parametrize("given", [[True, False], torch.tensor([True, False]), np.array([[True], [False]])])
def test_booleans_are_two_classes(given):
    assert read_labels(given, config(2)).values.tolist() == [1, 0]


def test_whole_floats_are_classes_only_where_the_config_says_so():
    assert read_labels([2.0, 0.0], config(problem_type=SINGLE_LABEL)).values.tolist() == [2, 0]
    with pytest.raises(DataError, match=r"float32.*expected class numbers from 0 to 2 as whole numbers"):
        read_labels([2.0, 0.0], config())
    with pytest.raises(DataError, match=r"Row 1 of rows has label 0.5; expected a class number from 0 to 2"):
        read_labels([2.0, 0.5], config(problem_type=SINGLE_LABEL))


MANY = {
    "floats": [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
    "whole numbers": [[1, 0, 1], [0, 0, 0]],
    "booleans": [[True, False, True], [False, False, False]],
    "float64": np.array([[1, 0, 1], [0, 0, 0]], dtype=np.float64),
    "tensors": [torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])],
    "names": [["pos", "neg"], []],
}


@pytest.mark.parametrize("given", MANY.values(), ids=MANY)
def test_many_labels_of_every_form_are_the_same_values(given):
    labels = read_labels(given, config(problem_type=MULTI_LABEL))
    assert labels.values.dtype == torch.float32
    assert labels.values.tolist() == MANY["floats"]


def test_rows_of_floats_mean_many_labels_as_in_the_stock_model():
    assert read_labels(MANY["floats"], config()).problem_type == MULTI_LABEL


@pytest.mark.parametrize("given", [[0.5, -2.0], [[0.5], [-2.0]], np.array([0.5, -2.0]), torch.tensor([0.5, -2.0])])
def test_floats_for_one_output_are_values(given):
    labels = read_labels(given, config(1))
    assert labels.problem_type == REGRESSION
    assert labels.values.tolist() == [0.5, -2.0]


@pytest.mark.parametrize("given", [[3, -1], [[3], [-1]], [True, False]])
def test_whole_numbers_are_values_where_the_config_says_so(given):
    labels = read_labels(given, config(1, REGRESSION))
    assert labels.values.dtype == torch.float32
    assert labels.values.tolist() == np.asarray(given, dtype=float).reshape(-1).tolist()


def test_rows_that_are_left_out_may_stand_among_classes_where_losses_pass_over_them():
    assert read_labels([2, -100], config()).values.tolist() == [2, -100]
    with pytest.raises(
        DataError, match=r"Row 1 of rows has label -100; expected 0 to 2 \(column 'labels'\). Rows to be left"
    ):
        read_labels([2, -100], config(), may_leave_out=False)


REFUSED = {
    "too large": ([0, 3], {}, r"Row 1 of rows has label 3; expected 0 to 2, or -100 to leave it out \(column 'y'\)"),
    "-1": ([0, 1, -1], {}, r"Row 2 of rows has label -1; .*GLUE's test rows"),
    "another name": (["pos", "good"], {}, r"Row 1 of rows has label 'good' \(column 'y'\); .*class names neg, neutral, pos"),
    "digits": (["0", "1"], {}, r"Row 0 of rows has label '0'"),
    "empty text": (["pos", ""], {}, r"Row 1 of rows has label ''"),
    "none": ([0, None, 1], {}, r"Row 1 of rows has no label \(column 'y' holds None\)"),
    "NA": (pd.Series([0, None], dtype="Int64"), {}, r"Row 1 of rows has no label"),
    "gap in names": (["pos", None], {}, r"Row 1 of rows has no label"),
    "nan among names": (["pos", float("nan")], {}, r"Row 1 of rows has no label"),
    "nan": ([0.0, float("nan")], {}, r"Row 1 of rows has a label that is not finite \(column 'y'\)"),
    "infinite": ([[0.0, 1.0, 0.0], [0.0, float("inf"), 0.0]], {}, r"Row 1 of rows has a label that is not finite"),
    "one-hot": ([[0, 1, 0], [1, 0, 0]], {}, r"Set problem_type='multi_label_classification' if .*take the place of the 1"),
    "one-hot for one label": (
        [[0, 1, 0], [1, 0, 0]],
        {"problem_type": SINGLE_LABEL},
        r"have shape \[2, 3\]; expected one class number",
    ),
    "ragged": ([[0], [1, 2]], {}, r"Row 1 of rows has label \[1, 2\]; expected as many numbers as row 0 \(1\)"),
    "ragged names": ([["pos"], ["pos", "neg"]], {}, r"Row 1 of rows has label \['pos', 'neg'\]"),
    "a list among numbers": ([0, [1]], {}, r"Row 1 of rows has label \[1\]; expected a number"),
    "dictionaries": ([{"a": 1}], {}, r"Row 0 of rows has label \{'a': 1\}; expected a number"),
    "bytes": ([b"pos", b"neg"], {}, r"Row 0 of rows has label b'pos'"),
    "dates": (np.array(["2020-01-01"], dtype="datetime64[D]"), {}, r"Row 0 of rows has label"),
    "complex": (torch.tensor([1j]), {}, r"complex64; expected numbers"),
    "huge": ([0, 10**30], {}, r"Row 1 of rows has label 10+.*; expected 0 to 2"),
    "huge, unsigned": (np.array([0, 2**64 - 1], dtype=np.uint64), {}, r"Row 1 of rows has label 9223372036854775807"),
    "three axes": (torch.zeros(2, 3, 1, dtype=torch.long), {}, r"have shape \[2, 3, 1\]"),
    "no axis": (torch.tensor(1), {}, r"are one value; expected one a row"),
    "whole numbers for one output": (
        [0, 1],
        {"num_labels": 1},
        r"rows has whole-number labels but the model has one output",
    ),
    "booleans for one output": (
        [True, False],
        {"num_labels": 1},
        r"rows has whole-number labels but the model has one output",
    ),
    "values for classes": ([0.5, 1.5], {}, r"load the model with num_labels=1 if they are values"),
    "two values for one": ([[0.5, 1.0]], {"num_labels": 1}, r"have shape \[1, 2\]; expected one value a row"),
    "names for values": (["pos"], {"num_labels": 1, "label2id": {"LABEL_0": 0}}, r"Row 0 of rows has label 'pos'"),
    "few of many": ([[1.0, 0.0]], {"problem_type": MULTI_LABEL}, r"shape \[1, 2\] .*takes 3 float values a row"),
    "one of many": ([0, 1], {"problem_type": MULTI_LABEL}, r"shape \[2\] .*takes 3 float values a row"),
    "beyond yes and no": (
        [[0, 1, 0], [0, 0, 2]],
        {"problem_type": MULTI_LABEL},
        r"Row 1 of rows has label 2; expected values from 0 \(no\) to 1 \(yes\) \(column 'y'\). This is that of label 2",
    ),
    "-100 of many": ([[0, -100, 0]], {"problem_type": MULTI_LABEL}, r"Row 0 of rows has label -100; .* that of label 1"),
    "other name of many": ([["pos"], ["good"]], {"problem_type": MULTI_LABEL}, r"Row 1 of rows has 'good', which is none"),
}


@pytest.mark.parametrize(("given", "fields", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_label_is_refused_by_row_and_column(given, fields, message):
    with pytest.raises(DataError, match=message) as caught:
        read_labels(given, config(**fields), column="y")
    assert caught.value.field == "y"


# --- the paths ----------------------------------------------------------------------------------------------------------

FORMS = {
    "booleans": lambda labels: [bool(label) for label in labels],
    "int32": lambda labels: np.array(labels, dtype=np.int32),
    "a column": lambda labels: [[label] for label in labels],
    "names": lambda labels: ["pos" if label else "neg" for label in labels],
}
WRONG = {
    "-1": (lambda labels: [-1] * len(labels), "Row 0 of .* has label -1"),
    "words": (lambda labels: ["good"] * len(labels), "Row 0 of .* has label 'good'"),
    "0/1 rows": (lambda labels: [[label, 1 - label] for label in labels], "one class number a row"),
    "values": (lambda labels: [label + 0.5 for label in labels], "class numbers from 0 to 1"),
    "a gap": (lambda labels: [None, *labels[1:]], "Row 0 of .* has no label"),
}
TWO = {"num_labels": 2, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
TEXTS, TRUTH = ["w5 w6", "w7", "w8 w9 w10", "w11"] * 4, [1, 0, 0, 1] * 4


def rows_with(tokenizer, **columns):
    return Dataset.from_dict({**tokenizer(TEXTS), **columns})


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_traces_take_every_form(tiny_model, tokenizer, form):
    model = tiny_model(**TWO)
    expected = ee.collect_trace(model, TEXTS, labels=TRUTH, tokenizer=tokenizer, progress=False)
    trace = ee.collect_trace(model, TEXTS, labels=form(TRUTH), tokenizer=tokenizer, progress=False)
    assert torch.equal(trace.labels, expected.labels)
    assert trace.problem_type == SINGLE_LABEL
    column = ee.collect_trace(model, rows_with(tokenizer, label=form(TRUTH)), progress=False)
    assert torch.equal(column.labels, expected.labels)


@pytest.mark.parametrize(("form", "message"), WRONG.values(), ids=WRONG)
def test_traces_refuse_by_row(tiny_model, tokenizer, form, message):
    with pytest.raises(DataError, match=message):
        ee.collect_trace(tiny_model(**TWO), TEXTS, labels=form(TRUTH), tokenizer=tokenizer, progress=False)


def test_a_trace_has_no_place_for_rows_that_are_left_out(tiny_model, tokenizer):
    with pytest.raises(DataError, match=r"Row 0 of rows has label -100; expected 0 to 1 .* drop them"):
        ee.collect_trace(tiny_model(**TWO), TEXTS, labels=[-100, *TRUTH[1:]], tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("form", [FORMS[name] for name in ("booleans", "int32", "a column")])
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_of_forward_is_the_same_for_every_form(tiny_model, random_batch, form, training):
    model = tiny_model(**TWO, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    batch, labels = random_batch(4), [1, 0, 0, 1]
    expected = model(**batch, labels=torch.tensor(labels)).loss
    assert torch.equal(model(**batch, labels=torch.as_tensor(form(labels))).loss, expected)


@pytest.mark.parametrize("label", [2, -1])
def test_forward_refuses_by_row(tiny_model, random_batch, label):
    with pytest.raises(DataError, match=f"Row 2 of the batch has label {label}; expected 0 to 1"):
        tiny_model(**TWO)(**random_batch(3), labels=torch.tensor([0, 1, label]))


def test_whole_numbers_of_many_labels_give_the_loss_of_floats(tiny_model, random_batch):
    model = tiny_model(problem_type=MULTI_LABEL)
    labels = torch.tensor([[1, 0, 1], [0, 0, 1]])
    batch = random_batch(2)
    assert torch.equal(model(**batch, labels=labels).loss, model(**batch, labels=labels.float()).loss)


def test_labels_between_yes_and_no_count_as_the_nearer():
    logits = torch.tensor([[2.0, -2.0, 2.0]])
    assert row_quality(logits, torch.tensor([[0.9, 0.1, 0.2]]), MULTI_LABEL).tolist() == pytest.approx([2 / 3])


@pytest.mark.parametrize(
    ("labels", "classes", "problem"),
    [([0, 2], 3, SINGLE_LABEL), ([[0.0, 1.0, 1.0]], 3, MULTI_LABEL), ([0.5], 1, REGRESSION), ([0, 1], 2, SINGLE_LABEL)],
)
def test_what_labels_mean_where_the_config_does_not_say(labels, classes, problem):
    assert label_problem_type(config(classes), torch.tensor(labels)) == problem
    assert label_problem_type(config(classes, REGRESSION), torch.tensor(labels)) == REGRESSION
