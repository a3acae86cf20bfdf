"""Reliability, memorized layers and F1, by hand and against scikit-learn."""

import pytest
import torch
from sklearn.metrics import f1_score

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError
from hf_earlyexit.metrics import f1, memorized_layer, reliability, uneven_classes
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def rows(*probabilities):
    """Logits of rows that give class 0 these probabilities."""
    return torch.tensor([[p, 1 - p] for p in probabilities], dtype=torch.float64).log()


def test_bins_and_gap_by_hand():
    # confidences .62 .68 .91 .99; right: yes no yes yes; bins .6-.7 and .9-1
    found = reliability(rows(0.62, 0.68, 0.91, 0.01), torch.tensor([0, 1, 0, 1]))
    assert found.confidence == pytest.approx((0.65, 0.95))
    assert found.accuracy == pytest.approx((0.5, 1.0))
    assert found.share == (0.5, 0.5)
    assert found.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)


def test_a_bin_counts_as_much_as_the_rows_it_holds():
    # confidences .62 .68 .66, all wrong, and .99, right
    found = reliability(rows(0.62, 0.68, 0.66, 0.01), torch.tensor([1, 1, 1, 1]))
    assert found.share == (0.75, 0.25)
    assert found.ece == pytest.approx((0.62 + 0.68 + 0.66) / 4 + 0.25 * 0.01)


def test_certainty_falls_into_the_last_bin():
    found = reliability(torch.tensor([[1e4, -1e4]]), torch.tensor([1]), num_bins=3)
    assert (found.confidence, found.accuracy, found.ece) == ((1.0,), (0.0,), 1.0)


def test_an_honest_exit_has_no_gap():
    generator = torch.Generator().manual_seed(0)
    chance = 0.5 + 0.5 * torch.rand(20000, generator=generator, dtype=torch.float64)
    wrong = (torch.rand(20000, generator=generator, dtype=torch.float64) > chance).long()
    assert reliability(torch.stack([chance, 1 - chance], 1).log(), wrong).ece < 0.02


@pytest.mark.parametrize(("count", "bins"), [(0, 10), (3, 0)])
def test_nothing_to_look_at_is_refused(count, bins):
    with pytest.raises(DataError, match="expected at least one"):
        reliability(torch.zeros(count, 2), torch.zeros(count, dtype=torch.long), bins)


def test_an_ignored_exit_knows_nothing():
    # exit 1 always says class 0, exit 2 is right on rows 0 and 1, exit 3 on rows 0, 1 and 2
    answers = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]])
    trace = ee.ExitTrace(logits=torch.eye(2)[answers], labels=torch.tensor([0, 1, 0, 1]), exit_layers=(2, 4, 6))
    assert memorized_layer(trace).tolist() == [2, 4, 6, 6]
    assert memorized_layer(trace, ignored=(0,)).tolist() == [4, 4, 6, 6]
    assert memorized_layer(trace, ignored=(0, 1)).tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize("classes", [2, 5])
def test_f1_is_that_of_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(300, classes, generator=generator)
    labels = (classes * torch.rand(300, generator=generator) ** 3).long()
    assert f1(logits, labels, SINGLE_LABEL) == pytest.approx(f1_score(labels, logits.argmax(-1), average="macro"))
    many = (torch.rand(300, classes, generator=generator) < 0.2).float()
    assert f1(logits, many, MULTI_LABEL) == pytest.approx(f1_score(many, logits > 0, average="micro"))
    assert f1(-torch.ones(3, 2), torch.zeros(3, 2), MULTI_LABEL) == 0.0


def test_a_class_that_never_occurs_has_no_part_in_f1():
    logits, labels = torch.eye(3)[torch.tensor([0, 0, 1, 0])], torch.tensor([0, 0, 1, 1])
    assert f1(logits, labels, SINGLE_LABEL) == pytest.approx((0.8 + 2 / 3) / 2)


def test_values_have_no_f1():
    with pytest.raises(DataError, match="no F1"):
        f1(torch.zeros(2, 1), torch.zeros(2), REGRESSION)


@pytest.mark.parametrize(
    ("counts", "uneven"),
    [((50, 50), False), ((65, 35), False), ((67, 33), True), ((50, 50, 0), True), ((30, 35, 35), False)],
)
def test_classes_are_uneven_where_accuracy_can_hide_the_rare_ones(counts, uneven):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert uneven_classes(labels, SINGLE_LABEL, len(counts)) is uneven
    assert uneven_classes(labels, REGRESSION, 1) is False
    assert uneven_classes(labels, MULTI_LABEL, 1) is True
