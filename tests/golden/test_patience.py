"""PABEE counted by hand. Paper: https://arxiv.org/abs/2006.04152"""

import pytest
import torch
from torch.nn.functional import one_hot

from hf_earlyexit.policies import PatiencePolicy
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from hf_earlyexit.signals import ExitSignal
from tests.samples import exits_of, scan

CLOSED = (None,) * 5
# what six exits say of three rows, and how often each has heard the same in a row after the first time
SAYS = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 0, 2, 2], [0, 1, 2, 0, 1, 2]])
COUNTS = [[0, 1, 0, 1, 2, 3], [0, 1, 2, 0, 0, 1], [0, 0, 0, 0, 0, 0]]
LOGITS = one_hot(SAYS, 3).float()


def test_the_counter_goes_up_with_each_agreement_and_back_to_zero():
    assert scan(PatiencePolicy(thresholds=CLOSED), LOGITS).scores.tolist() == COUNTS


@pytest.mark.parametrize(
    ("patience", "exits"),
    [
        (1, [1, 1, 5]),  # row 1 reaches 1 at exit 2, row 2 too, row 3 never: the last exit
        (2, [4, 2, 5]),  # row 1 reaches 2 at exit 5, row 2 at exit 3
        (3, [5, 5, 5]),  # row 1 reaches 3 at the last exit only
    ],
)
def test_rows_leave_when_their_own_patience_is_reached(patience, exits):
    assert exits_of(PatiencePolicy(thresholds=(patience,) * 5), LOGITS) == exits


def test_how_sure_an_exit_is_does_not_count():
    policy = PatiencePolicy(thresholds=CLOSED)
    assert scan(policy, 0.01 * LOGITS).scores.tolist() == scan(policy, 1000 * LOGITS).scores.tolist() == COUNTS


def test_what_is_remembered_of_a_row_does_not_grow_with_the_classes():
    state = PatiencePolicy(thresholds=CLOSED).init_state(4, 50_000, "cpu")
    assert [part.shape for part in state] == [(4,)] * 3
    state, *_ = PatiencePolicy(thresholds=CLOSED).update(state, ExitSignal(torch.zeros(4, 50_000)), 0)
    assert [part.shape for part in state] == [(4,)] * 3


def test_values_agree_within_the_tolerance():
    # changes: .25 <= .25 yes | .50 no | .125 yes | .25 yes | 1.0 no
    values = torch.tensor([[[1.0], [1.25], [1.75], [1.625], [1.375], [0.375]]])
    policy = PatiencePolicy(thresholds=CLOSED, problem_type=REGRESSION, tolerance=0.25)
    assert scan(policy, values).scores.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert exits_of(policy.with_thresholds(2), values) == [4]


def test_a_slow_drift_within_the_tolerance_is_agreement():
    # each exit is compared with the one before, not with the start of the chain
    values = torch.tensor([[[0.0], [0.25], [0.5], [0.75], [1.0], [1.25]]])
    policy = PatiencePolicy(thresholds=CLOSED, problem_type=REGRESSION, tolerance=0.25)
    assert scan(policy, values).scores.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_with_many_labels_the_whole_set_must_stay():
    # sets: {a}, {a}, {a, b}, {a, b}, {}, {}
    sets = torch.tensor([[[1, -1], [2, -3], [1, 1], [9, 9], [-1, -1], [-2, -1]]]).float()
    policy = PatiencePolicy(thresholds=CLOSED, problem_type=MULTI_LABEL)
    assert scan(policy, sets).scores.tolist() == [[0, 1, 0, 1, 0, 1]]


def test_a_muted_exit_is_not_heard():
    # row 1 without exit 3: 0 0 . 1 1 1 -> 0 1 . 0 1 2
    policy = PatiencePolicy(thresholds=CLOSED, muted=(2,))
    assert scan(policy, LOGITS).scores[0].tolist() == [0, 1, -torch.inf, 0, 1, 2]
