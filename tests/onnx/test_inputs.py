"""What an exported model takes as inputs, and what it refuses in words."""

import numpy as np
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError


@pytest.fixture(scope="module")
def served(tiny_model, open_policy, tmp_path_factory):
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    folder = tmp_path_factory.mktemp("onnx")
    ee.export_onnx(model, folder, forms=["layers"])
    return ee.OnnxClassifier.from_pretrained(folder, threads=1)


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda values: values.numpy(),
        lambda values: values.numpy().astype(np.int32),
        lambda values: values.int(),
        lambda values: values.tolist(),
    ],
)
def test_numbers_of_any_make_are_the_same_batch(served, random_batch, make, early_exit):
    batch = random_batch(8)
    expected = served(**batch, early_exit=early_exit)
    answers = served(**{name: make(values) for name, values in batch.items()}, early_exit=early_exit)
    assert torch.equal(answers.logits, expected.logits)
    assert torch.equal(answers.exit_layer, expected.exit_layer)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("input_ids", lambda values: values + 1000, "input_ids holds other numbers than the model knows; expected 0 to 99"),
        ("input_ids", lambda values: values[0], r"input_ids has shape \[16\]; expected \[rows, tokens\]"),
        ("input_ids", lambda values: values + 0.5, "input_ids holds other numbers"),
        (
            "token_type_ids",
            lambda values: values + 2,
            "token_type_ids holds other numbers than the model knows; expected 0 to 1",
        ),
        ("token_type_ids", lambda values: values - 1, "token_type_ids holds other numbers"),
        (
            "attention_mask",
            lambda values: values[:, None, None],
            r"has shape \[4, 1, 1, 16\]; expected \[4, 16\]",
        ),
        ("attention_mask", lambda values: values * torch.nan, "attention_mask holds other numbers"),
        ("attention_mask", lambda values: values[:2], r"attention_mask has shape \[2, 16\]"),
    ],
)
def test_what_the_model_cannot_read_is_refused_in_words(served, random_batch, name, change, words):
    batch = random_batch(4)
    with pytest.raises(DataError, match=words):
        served(**{**batch, name: change(batch[name])})
