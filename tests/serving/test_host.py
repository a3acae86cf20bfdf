"""What the host does for a row beside tokenizing and computing, in calls of Python functions."""

import pytest

import hf_earlyexit as ee
from tests.work import calls

OURS = "hf_earlyexit/", "transformers/configuration_utils", "transformers/integrations/heterogeneity"
TEXT, IDS = "w5 w6 w7 w8", {"input_ids": [2, 5, 6, 7, 8, 3], "attention_mask": [1] * 6}


def per_row(go, row):
    """Calls for one row more."""
    go([row] * 5)  # what is imported and made once
    few, many = (calls(lambda count=count: go([row] * count), *OURS) for count in (200, 400))
    return (many - few).total() / 200


@pytest.fixture(scope="module")
def ways(tiny_model, tokenizer, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    pipe = ee.pipeline("text-classification", model=model, tokenizer=tokenizer)
    return {
        "texts": (lambda rows: ee.predict(model, rows, tokenizer=tokenizer), TEXT),
        "ids": (lambda rows: ee.predict(model, rows), IDS),
        "list": (pipe, TEXT),
        "generator": (lambda rows: list(pipe((row for row in rows), window=4096)), TEXT),
    }


@pytest.mark.parametrize(("way", "most"), [("texts", 7), ("ids", 15), ("list", 16)])
def test_a_row_takes_few_calls(ways, way, most):
    """It took 24, 29 and 70: a config was asked for every row, what a tokenizer gave was read once more."""
    assert per_row(*ways[way]) <= most


def test_a_generator_that_is_read_ahead_takes_no_more_than_a_list(ways):
    assert per_row(*ways["generator"]) <= per_row(*ways["list"])


def test_a_call_of_one_row_asks_for_no_names_of_modules(tiny_model, open_policy):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    ee.predict(model, [IDS])
    named = calls(lambda: ee.predict(model, [IDS]), "torch/nn/modules/module.py")["module.py:named_modules"]
    assert named < len(list(model.modules()))  # the first weight tells dtype and device
