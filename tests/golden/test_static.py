import pytest
import torch

from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import StaticPolicy
from hf_earlyexit.problem_types import REGRESSION
from tests.samples import exits_of, scan

LOGITS = torch.randn(7, 4, 2, generator=torch.Generator().manual_seed(0))


def test_the_score_is_the_number_of_the_exit():
    assert scan(StaticPolicy(thresholds=(None, None, None)), LOGITS).scores.tolist() == [[1, 2, 3, 4]] * 7


@pytest.mark.parametrize("exit_index", [0, 1, 2, 3])
def test_every_row_leaves_at_the_chosen_exit(exit_index):
    assert exits_of(StaticPolicy.at(exit_index, 4), LOGITS) == [exit_index] * 7


@pytest.mark.parametrize("threshold", [1, 2, 3, 4])
def test_one_threshold_for_all_exits_is_the_number_of_the_exit_to_leave_at(threshold):
    assert exits_of(StaticPolicy(thresholds=(threshold,) * 3), LOGITS) == [threshold - 1] * 7


def test_serving_computes_no_other_exit():
    policy = StaticPolicy.at(1, 4)
    assert [policy.wants(index) for index in range(4)] == [False, True, False, True]


def test_fields_are_passed_on():
    policy = StaticPolicy.at(1, 3, problem_type=REGRESSION, exit_layers=(4, 8, 12))
    assert (policy.problem_type, policy.exit_layers, policy.thresholds) == (REGRESSION, (4, 8, 12), (None, 2.0))


@pytest.mark.parametrize("exit_index", [-1, 4, 99])
def test_an_exit_that_is_not_there_is_refused(exit_index):
    with pytest.raises(PolicyError) as caught:
        StaticPolicy.at(exit_index, 4)
    assert caught.value.field == "exit_index"
