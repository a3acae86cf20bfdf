"""Memorized layers and the other measures, by hand."""

import math

import pytest
import torch

from hf_earlyexit.errors import DataError
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from hf_earlyexit.trace import ExitTrace
from hf_earlyexit.training.hardness import HARDNESS
from hf_earlyexit.training.outcomes import Outcomes
from tests.samples import learned_trace


def rightness(*rows, layers=None):
    """A trace of two classes, all labelled 1, whose exits are right where a row says 1."""
    right = torch.tensor(rows)
    logits = torch.stack([1.0 - right, right.float()], -1)
    labels = torch.ones(len(right), dtype=torch.long)
    return ExitTrace(logits=logits, labels=labels, exit_layers=layers or tuple(range(1, right.shape[1] + 1)))


def layers_of(measure, trace):
    return HARDNESS.get(measure)(Outcomes.of(trace))


ROWS = ((1, 0, 1, 1), (1, 1, 1, 1), (1, 1, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0))


def test_the_memorized_layer_is_the_first_from_which_on_all_exits_are_right():
    assert layers_of("memorized", rightness(*ROWS)).tolist() == [3, 1, 4, 4, 4]


def test_the_oracle_layer_is_the_first_right_exit_whatever_comes_later():
    assert layers_of("oracle", rightness(*ROWS)).tolist() == [1, 1, 1, 4, 4]


@pytest.mark.parametrize(("measure", "expected"), [("memorized", [9, 3, 12, 12, 12]), ("oracle", [3, 3, 3, 12, 12])])
def test_hardness_counts_layers_not_exits(measure, expected):
    assert layers_of(measure, rightness(*ROWS, layers=(3, 6, 9, 12))).tolist() == expected


def test_loss_hardness_is_the_last_loss_between_the_fifth_smallest_and_the_fifth_largest():
    losses = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])  # fifth: 0.1 and 0.4
    chance = (-losses).exp()
    logits = torch.stack([torch.log(1 - chance), torch.log(chance)], -1)[:, None].repeat(1, 2, 1)
    trace = ExitTrace(logits=logits, labels=torch.ones(12, dtype=torch.long), exit_layers=(5, 10))
    by_hand = [0, 0, 0, 0, 0, 10 / 3, 20 / 3, 10, 10, 10, 10, 10]
    assert layers_of("loss", trace).tolist() == pytest.approx(by_hand, abs=1e-4)


def test_no_hardness_is_zero():
    assert layers_of("none", rightness(*ROWS)).tolist() == [0] * 5


def test_with_many_labels_an_exit_is_right_if_every_label_is():
    logits = torch.tensor([[[1.0, -1.0], [1.0, 1.0], [1.0, -1.0]]])
    trace = ExitTrace(logits=logits, labels=torch.tensor([[1.0, 0.0]]), exit_layers=(1, 2, 3), problem_type=MULTI_LABEL)
    assert layers_of("memorized", trace).tolist() == [3]
    assert layers_of("oracle", trace).tolist() == [1]


def test_values_have_no_memorized_layer_but_a_loss():
    trace = learned_trace(50, problem_type=REGRESSION)
    with pytest.raises(DataError, match="use hardness 'loss' or 'none'"):
        layers_of("memorized", trace)
    measured = layers_of("loss", trace)
    assert (float(measured.min()), float(measured.max())) == (0, 4)


@pytest.mark.parametrize("measure", HARDNESS.names())
def test_every_measure_stays_between_zero_and_the_number_of_layers(measure):
    measured = layers_of(measure, learned_trace(200))
    assert measured.shape == (200,)
    assert bool(((measured >= 0) & (measured <= 4) & torch.isfinite(measured)).all())
    assert not math.isnan(float(layers_of(measure, learned_trace(1)).sum()))
