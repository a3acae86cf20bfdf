"""Largest probability, entropy and margin worked by hand."""

import math

import pytest
import torch

from hf_earlyexit.policies import ConfidencePolicy, EntropyPolicy, MarginPolicy
from hf_earlyexit.policies.measures import top_two
from hf_earlyexit.problem_types import MULTI_LABEL
from tests.samples import exits_of, scan

# One row; exits with probabilities (1/3, 1/3, 1/3), (1/2, 1/4, 1/4), (.8, .1, .1) and, certain, (1, 0, 0).
LOGITS = torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.25, 0.25], [0.8, 0.1, 0.1], [1.0, 0.0, 0.0]]).log().clamp_min(-1e4)[None]
CLOSED = (None, None, None)


def scores(cls, logits=LOGITS, **fields):
    return scan(cls(thresholds=(None,) * (logits.shape[1] - 1), **fields), logits).scores[0].tolist()


def test_confidence_is_the_largest_probability():
    assert scores(ConfidencePolicy) == pytest.approx([1 / 3, 0.5, 0.8, 1.0], abs=1e-6)


def test_margin_is_the_gap_between_the_first_two():
    assert scores(MarginPolicy) == pytest.approx([0.0, 0.25, 0.7, 1.0], abs=1e-6)


def test_certainty_is_one_minus_the_share_of_the_largest_entropy():
    # H(1/2, 1/4, 1/4) = .5 log 2 + .5 log 4 = 1.5 log 2 = 1.0397;  / log 3 (1.0986) = .9464 -> .0536
    # H(.8, .1, .1) = -.8 log .8 - .2 log .1 = .1785 + .4605 = .6390;  / 1.0986 = .5817 -> .4183
    assert scores(EntropyPolicy) == pytest.approx([0.0, 0.0536, 0.4183, 1.0], abs=5e-5)


def test_deeberts_entropy_in_nats_is_one_minus_the_threshold_times_log_c():
    # leave where H < .7 nats: exit 3 (.6390), not exit 2 (1.0397). In our words: 1 - .7 / log 3 = .3628
    threshold = 1 - 0.7 / math.log(3)
    assert exits_of(EntropyPolicy(thresholds=(threshold,) * 3), LOGITS) == [2]
    assert exits_of(EntropyPolicy(thresholds=(1 - 1.05 / math.log(3),) * 3), LOGITS) == [1]


@pytest.mark.parametrize(
    ("cls", "threshold", "exits"),
    [
        (ConfidencePolicy, 0.33, [0]),  # .3333 reaches it at once
        (ConfidencePolicy, 0.79, [2]),
        (ConfidencePolicy, 0.81, [3]),
        (MarginPolicy, 0.24, [1]),
        (MarginPolicy, 0.26, [2]),
    ],
)
def test_a_row_leaves_at_the_first_exit_that_reaches_the_threshold(cls, threshold, exits):
    assert exits_of(cls(thresholds=(threshold,) * 3), LOGITS) == exits


def test_a_score_equal_to_the_threshold_leaves():
    even = torch.zeros(1, 2, 2)  # largest probability exactly one half
    assert exits_of(ConfidencePolicy(thresholds=(0.5,)), even) == [0]
    assert exits_of(ConfidencePolicy(thresholds=(0.5000001,)), even) == [1]


def test_with_many_labels_the_least_sure_label_counts():
    # labels with probabilities .9 and .3: largest .9 and .7 -> .7; margins .8 and .4 -> .4
    # entropies H(.9) = .3251, H(.3) = .6109; / log 2 = .4690, .8813 -> the smaller certainty is .1187
    logits = torch.tensor([[0.9, 0.3], [0.5, 0.5]]).logit()[None]
    assert scores(ConfidencePolicy, logits, problem_type=MULTI_LABEL) == pytest.approx([0.7, 0.5], abs=1e-6)
    assert scores(MarginPolicy, logits, problem_type=MULTI_LABEL) == pytest.approx([0.4, 0.0], abs=1e-6)
    assert scores(EntropyPolicy, logits, problem_type=MULTI_LABEL) == pytest.approx([0.1187, 0.0], abs=5e-5)


@pytest.mark.parametrize("cls", [ConfidencePolicy, MarginPolicy, EntropyPolicy])
def test_a_constant_added_to_all_logits_changes_nothing(cls):
    assert scores(cls, LOGITS + 500) == pytest.approx(scores(cls), abs=1e-4)


def test_with_three_classes_the_margin_is_to_the_second_not_to_the_last():
    logits = torch.tensor([[[0.5, 0.3, 0.2]], [[0.1, 0.3, 0.6]]]).log().repeat(1, 2, 1)
    assert scan(MarginPolicy(thresholds=(0.9,)), logits).scores[:, 0].tolist() == pytest.approx([0.2, 0.3], abs=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 40])
def test_the_two_largest_are_those_of_topk_also_where_they_are_equal(classes):
    values = torch.randint(-3, 3, (200, classes), generator=torch.Generator().manual_seed(0)).float().log_softmax(-1)
    assert torch.equal(torch.stack(top_two(values), -1), values.topk(2).values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("policy", [ConfidencePolicy, EntropyPolicy, MarginPolicy])
def test_scores_of_half_precision_logits_are_computed_in_float32(policy, dtype):
    logits = torch.randn(50, 2, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, full = (scan(policy(thresholds=(0.9,)), given).scores for given in (logits, logits.float()))
    assert half.dtype == torch.float32
    assert torch.equal(half, full)
