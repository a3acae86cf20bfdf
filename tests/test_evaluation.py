"""Early exit in the `evaluate` library, offline."""

import numpy as np
import pandas
import pyarrow
import pytest
import transformers
from datasets import Dataset, DatasetDict
from evaluate import evaluator

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.evaluation import EarlyExitEvaluator


@pytest.fixture
def pipe(tiny_model, tokenizer, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return ee.pipeline(model=model, tokenizer=tokenizer)


@pytest.fixture
def rows(random_texts):
    return Dataset.from_dict({"text": random_texts(30), "label": [row % 3 for row in range(30)]})


def test_figures_by_hand():
    found = ee.evaluation.EarlyExitMetric().compute(
        predictions=[1, 0, 2], references=[1, 1, 2], exit_layers=[1, 2, 6], num_layers=6
    )
    assert found == {"accuracy": pytest.approx(2 / 3), "mean_layers": 3.0, "layer_speed_up": 2.0}


def test_batches_add_up():
    metric = ee.evaluation.EarlyExitMetric()
    metric.add_batch(predictions=[1, 0], references=[1, 1])
    metric.add_batch(predictions=[1], references=[1])
    assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.parametrize(("layers", "depth"), [([0, 1], 6), ([1, 7], 6), ([1, 2], None)])
def test_impossible_layers_are_refused(layers, depth):
    with pytest.raises(DataError, match="expected layers from 1"):
        ee.evaluation.EarlyExitMetric().compute(predictions=[0, 0], references=[0, 0], exit_layers=layers, num_layers=depth)


def test_the_stock_evaluator_takes_our_pipeline_and_metric(pipe, rows, monkeypatch):
    # evaluate 0.4.6 looks for a class that transformers 5 no longer has, whatever the pipeline
    monkeypatch.setattr(transformers, "TFPreTrainedModel", transformers.PreTrainedModel, raising=False)
    found = evaluator("text-classification").compute(
        pipe, data=rows, metric=ee.evaluation.EarlyExitMetric(), label_mapping=pipe.model.config.label2id
    )
    answers = [pipe.model.config.label2id[answer["label"]] for answer in pipe(rows["text"][:])]
    assert found["accuracy"] == sum(a == b for a, b in zip(answers, rows["label"], strict=True)) / 30
    assert found["total_time_in_seconds"] > 0


def test_our_evaluator_counts_layers_too(pipe, rows):
    found = EarlyExitEvaluator(num_layers=4).compute(
        pipe, data=rows, metric=ee.evaluation.EarlyExitMetric(), label_mapping=pipe.model.config.label2id
    )
    layers = [answer["exit_layer"] for answer in pipe(rows["text"][:])]
    assert len(set(layers)) > 1
    assert found["mean_layers"] == sum(layers) / 30
    assert found["layer_speed_up"] == pytest.approx(4 * 30 / sum(layers))


def test_our_evaluator_wants_a_pipeline(pipe, rows):
    with pytest.raises(UsageError, match=r"hf_earlyexit\.pipeline"):
        EarlyExitEvaluator(num_layers=4).compute(pipe.model, data=rows, metric=ee.evaluation.EarlyExitMetric())


def figures(pipe, data, **options):
    found = EarlyExitEvaluator(num_layers=4).compute(
        pipe, data=data, metric=ee.evaluation.EarlyExitMetric(), label_mapping=pipe.model.config.label2id, **options
    )
    return {name: found[name] for name in ("accuracy", "mean_layers", "layer_speed_up")}


@pytest.mark.parametrize("kind", ["frame", "frame with gaps in its index", "columns", "arrow", "arrays"])
def test_tables_are_rows_of_our_evaluator(pipe, rows, kind):
    columns = {"text": rows["text"][:], "label": rows["label"][:]}
    if kind == "arrow":
        data = pyarrow.table(columns)
    elif kind == "columns":
        data = columns
    elif kind == "arrays":
        data = {name: np.array(values) for name, values in columns.items()}
    else:
        data = pandas.DataFrame(columns)
        if "gaps" in kind:
            data.index = range(0, 90, 3)
    assert figures(pipe, data) == figures(pipe, rows)


def test_pairs_in_a_table_are_read(pipe, rows, random_texts):
    columns = {"one": rows["text"][:], "two": random_texts(60)[30:], "y": rows["label"][:]}
    names = {"input_column": "one", "second_input_column": "two", "label_column": "y"}
    assert figures(pipe, pandas.DataFrame(columns), **names) == figures(pipe, Dataset.from_dict(columns), **names)
    assert figures(pipe, columns, **names) != figures(pipe, rows)


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (lambda tokenizer, rows: tokenizer(rows["text"][:]), DataError, "input_column is 'text'. Pipelines take texts, not"),
        (lambda tokenizer, rows: rows.rename_column("label", "y"), DataError, "columns text, y; label_column is 'label'"),
        (lambda tokenizer, rows: rows["text"][:], UsageError, "data is of type list; expected a data set"),
        (lambda tokenizer, rows: DatasetDict(test=rows), UsageError, "of splits"),
        (lambda tokenizer, rows: {"text": ["w5", None], "label": [0, 1]}, DataError, "Row 1 of data has no text"),
        (lambda tokenizer, rows: {"text": ["w5", "w6"], "label": [None, 1]}, DataError, "Row 0 of data has no label"),
        (lambda tokenizer, rows: {"text": ["w5", "w6"], "label": [1]}, DataError, "different lengths"),
    ],
)
def test_what_is_no_table_of_texts_is_refused(pipe, rows, tokenizer, data, error, words):
    with pytest.raises(error, match=words):
        figures(pipe, data(tokenizer, rows))
