import pytest
import torch
from torch import tensor

from hf_earlyexit.problem_types import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    largest,
    majority_quality,
    predictions,
    row_quality,
    same_prediction,
)


def test_predictions_are_a_class_a_set_or_a_value():
    logits = tensor([[0.5, -1.0, 2.0], [3.0, 0.1, 0.2]])
    assert predictions(logits, SINGLE_LABEL).tolist() == [2, 0]
    assert predictions(logits, MULTI_LABEL).tolist() == [[True, False, True], [True, True, True]]
    assert torch.equal(predictions(logits, REGRESSION), logits)


def test_the_largest_is_the_first_of_equals_wherever_numbers_lie():
    logits = torch.randint(4, (50, 3, 6), generator=torch.Generator().manual_seed(0)).float()
    for part in (logits, logits[:, 1], logits.transpose(0, 1), logits.bfloat16(), logits[0, 0], logits[:0]):
        expected = [(row == row.max()).nonzero()[0].item() for row in part.reshape(-1, 6)]
        assert largest(part).flatten().tolist() == expected
        assert largest(part).shape == part.shape[:-1]


def test_a_graph_of_predictions_looks_for_the_largest_itself():
    class Says(torch.nn.Module):
        def forward(self, logits):
            return predictions(logits, SINGLE_LABEL)

    logits = tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]])
    for strict in (False, True):
        graph = torch.export.export(Says(), (torch.zeros(2, 3),), strict=strict)
        assert graph.module()(logits).tolist() == [1, 0]


def test_a_logit_of_zero_is_a_no():
    assert predictions(tensor([[0.0, 1e-6]]), MULTI_LABEL).tolist() == [[False, True]]


def test_two_exits_agree_row_by_row():
    first = tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    second = tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    assert same_prediction(first, second, SINGLE_LABEL).tolist() == [True, False, True]


def test_sets_agree_only_if_every_label_does():
    first = tensor([[1.0, -1.0, 1.0], [1.0, -1.0, 1.0]])
    second = tensor([[2.0, -2.0, 2.0], [1.0, -1.0, -1.0]])
    assert same_prediction(first, second, MULTI_LABEL).tolist() == [True, False]


def test_values_agree_within_the_tolerance_in_every_output():
    first = tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    second = tensor([[1.25, 1.0], [1.25, 1.5], [0.75, 0.75]])
    assert same_prediction(first, second, REGRESSION, 0.25).tolist() == [True, False, True]


def test_quality_of_one_label_is_right_or_wrong():
    logits = tensor([[[2.0, 1.0], [1.0, 2.0]], [[0.0, 1.0], [0.0, 2.0]]])  # [2, 2, 2]
    labels = tensor([0, 1])
    assert row_quality(logits, labels, SINGLE_LABEL).tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert row_quality(logits[:, 1], labels, SINGLE_LABEL).tolist() == [0.0, 1.0]


def test_quality_of_many_labels_is_the_share_of_right_ones():
    logits = tensor([[[1.0, -1.0, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]]])  # [1, 2, 4]
    labels = tensor([[1.0, 0.0, 0.0, 0.0]])
    assert row_quality(logits, labels, MULTI_LABEL).tolist() == [[0.75, 0.25]]
    assert row_quality(logits[:, 0], labels, MULTI_LABEL).tolist() == [0.75]


@pytest.mark.parametrize("labels", [tensor([1.0, 3.0]), tensor([[1.0], [3.0]])])
def test_quality_of_a_value_is_minus_the_squared_error(labels):
    logits = tensor([[[1.5], [1.0]], [[1.0], [2.5]]])  # [2, 2, 1]
    assert row_quality(logits, labels, REGRESSION).tolist() == [[-0.25, 0.0], [-4.0, -0.25]]
    assert row_quality(logits[:, 0], labels, REGRESSION).tolist() == [-0.25, -4.0]


def test_quality_is_in_double_precision():
    assert row_quality(torch.zeros(2, 3, 1), torch.zeros(2), REGRESSION).dtype == torch.float64


def test_the_best_constant_answer():
    assert majority_quality(tensor([0, 1, 1, 2, 1]), SINGLE_LABEL) == pytest.approx(3 / 5)
    # label 0: 3 of 4 yes -> .75; label 1: 1 of 4 yes -> answer no, .75; label 2: 2 of 4 -> .5
    sets = tensor([[1, 0, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    assert majority_quality(sets, MULTI_LABEL) == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    # mean 2, squared distances 1, 0, 1 -> minus their mean
    assert majority_quality(tensor([1.0, 2.0, 3.0]), REGRESSION) == pytest.approx(-2 / 3)


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
def test_no_constant_answer_beats_the_best_one(problem_type):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randn(50, 2, generator=generator)
    labels = (labels > 0).float() if problem_type == MULTI_LABEL else labels
    constants = torch.randn(200, 2, generator=generator)
    reached = [float(row_quality(c.expand(50, 2), labels, problem_type).mean()) for c in constants]
    assert max(reached) <= majority_quality(labels, problem_type) + 1e-12
    assert max(reached) > majority_quality(labels, problem_type) - 0.1
