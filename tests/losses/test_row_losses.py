"""Losses row by row, by hand, and as the mean that a batch's loss is."""

import math

import pytest
import torch

from hf_earlyexit.losses.base import label_losses, row_losses, task_loss
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def test_class_losses_by_hand_and_label_zero_counts_as_any_other():
    # the label's probability is .5, .25, .8 and .5; the last row is left out
    logits = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.8, 0.2], [0.5, 0.5]]).log()[:, None]
    labels = torch.tensor([0, 1, 0, -100])
    expected = [math.log(2), math.log(4), math.log(1.25), 0.0]
    assert row_losses(logits, labels, SINGLE_LABEL)[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(task_loss(logits[:, 0], labels, SINGLE_LABEL)) == pytest.approx(sum(expected) / 3)


@pytest.mark.parametrize("label", [0, 1, 2])
def test_a_batch_of_one_class_alone_has_its_loss_whatever_the_class(label):
    logits, labels = torch.zeros(4, 3), torch.full((4,), label)
    assert float(task_loss(logits, labels, SINGLE_LABEL)) == pytest.approx(math.log(3))
    assert row_losses(logits[:, None], labels, SINGLE_LABEL)[:, 0].tolist() == pytest.approx([math.log(3)] * 4)


def test_a_batch_whose_labels_are_all_ignored_has_loss_zero():
    logits = torch.zeros(3, 2, requires_grad=True)
    loss = task_loss(logits, torch.full((3,), -100), SINGLE_LABEL)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert float(logits.grad.abs().max()) == 0.0


def test_many_labels_and_values_are_means_over_outputs():
    logits = torch.tensor([[[0.8, 0.4]]]).logit()
    expected = -(math.log(0.8) + math.log(0.6)) / 2
    assert float(row_losses(logits, torch.tensor([[1, 0]]), MULTI_LABEL)) == pytest.approx(expected, rel=1e-5)
    assert float(row_losses(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.0, 4.0]]), REGRESSION)) == (1 + 4) / 2


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
def test_an_exits_loss_is_the_mean_of_its_rows_losses(problem_type):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, 4, generator=generator).half()
    labels = {
        SINGLE_LABEL: torch.randint(4, (7,), generator=generator),
        MULTI_LABEL: torch.randint(2, (7, 4), generator=generator),
        REGRESSION: torch.randn(7, 4, generator=generator),
    }[problem_type]
    rows = row_losses(logits, labels, problem_type)
    assert (rows.shape, rows.dtype) == ((7, 3), torch.float32)
    assert torch.allclose(rows.mean(0), label_losses(logits.float(), labels, problem_type), atol=1e-6)
