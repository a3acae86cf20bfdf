"""Fixtures shared by the tests of the Trainer: labelled token ids, and a trainer on them."""

from functools import partial

import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee


def make_rows(count, seed=0, **columns):
    """Token ids of different lengths, labelled by the first word; a column that is given as `None` is left out."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 12, (count,), generator=generator).tolist()
    ids = [torch.randint(5, 100, (length,), generator=generator).tolist() for length in lengths]
    given = {
        "input_ids": ids,
        "attention_mask": [[1] * n for n in lengths],
        "labels": [row[0] % 3 for row in ids],
        **columns,
    }
    return Dataset.from_dict({name: value for name, value in given.items() if value is not None})


@pytest.fixture(scope="session")
def rows():
    """`rows(count, seed=0, **columns)`: see `make_rows`."""
    return make_rows


@pytest.fixture
def arguments(arguments):
    return partial(arguments, per_device_train_batch_size=8, max_steps=3)


@pytest.fixture
def trainer(tiny_model, tokenizer, arguments, rows):
    """`trainer(model=, args=, train_dataset=, ...)`: ready to run, on 32 rows unless told otherwise."""

    def make(model=None, args=None, cls=ee.EarlyExitTrainer, **fields):
        usual = {"train_dataset": rows(32), "eval_dataset": rows(20, seed=1), "processing_class": tokenizer}
        return cls(model=model or tiny_model(), args=args or arguments(), **{**usual, **fields})

    return make
