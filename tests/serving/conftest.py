"""What most tests of serving answer with."""

from functools import cache

import pytest
import torch

from hf_earlyexit.serving.answers import Answers, Leaving
from hf_earlyexit.serving.rows import encode_rows


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    """A tiny model whose rows leave at several layers; one for each file."""
    model = tiny_model()
    model.set_exit_policy(open_policy(model, "confidence"))
    return model


@pytest.fixture(scope="session")
def rows(tokenizer, random_texts):
    """500 rows of 1 to 40 words."""
    return tuple(encode_rows(random_texts(500, longest=40), tokenizer))


def alone(model, rows):
    """What `forward` says of every row by itself."""
    answers = Answers.blank(len(rows), model.num_labels)
    with torch.inference_mode():
        for place, row in enumerate(rows):
            output = model(input_ids=torch.tensor([row["input_ids"]]))
            exit_index = model.exit_layers.index(int(output.exit_layer))
            answers.write([Leaving([place], output.logits, exit_index, output.exit_score, ["policy"])])
    return answers


@pytest.fixture(scope="session")
def in_forward(tiny_model, open_policy, rows):
    """`in_forward(name, count)`: a tiny model with that policy, and what `forward` says of the first rows, each by itself.

    Every file's `model` is that of "confidence".
    """

    @cache
    def make(name, count):
        model = tiny_model()
        model.set_exit_policy(open_policy(model, name))
        return model, alone(model, rows[:count])

    return make
