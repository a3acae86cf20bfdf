"""BEEM worked by hand. Paper: https://arxiv.org/abs/2502.00745"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_earlyexit.calibration import FinalLayerError
from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies import (
    BeemAccuracyPolicy,
    BeemCostPolicy,
    BeemPolicy,
    ConfidencePolicy,
    MarginPolicy,
    PatiencePolicy,
)
from hf_earlyexit.problem_types import MULTI_LABEL
from hf_earlyexit.trace import ExitTrace
from tests.samples import exits_of, scan, two_class_row

# The paper's figure: weights .1, .2, .3, .4 (BEEM-C with lambda = .1). The third exit changes its mind.
WEIGHTS = (0.1, 0.2, 0.3, 0.4)
ROW = two_class_row(confidences=(0.65, 0.80, 0.90, 0.95), classes=(1, 1, 0, 0))
CLOSED = (None, None, None)


def close(expected):
    return pytest.approx(expected, abs=1e-6)


def scores(policy, logits=ROW):
    return scan(policy, logits).scores[0].tolist()


def test_the_papers_recursion():
    # S1 = .1 * .65             = .065
    # S2 = .065 + .2 * .80      = .225    same class: added
    # S3 =        .3 * .90      = .270    other class: the chain starts again with its own term
    # S4 = .270 + .4 * .95      = .650    same class: added
    assert scores(BeemPolicy(weights=WEIGHTS, thresholds=CLOSED)) == close([0.065, 0.225, 0.270, 0.650])


def test_the_papers_threshold_of_a_fifth_leaves_at_the_second_exit():
    assert exits_of(BeemPolicy(weights=WEIGHTS, thresholds=(0.2, 0.2, 0.2)), ROW) == [1]  # .065 < .2 <= .225
    assert exits_of(BeemPolicy(weights=WEIGHTS, thresholds=(0.25, 0.25, 0.25)), ROW) == [2]  # .225 < .25 <= .270
    assert exits_of(BeemPolicy(weights=WEIGHTS, thresholds=(0.3, 0.3, 0.3)), ROW) == [3]  # .270 < .3: the last exit


def test_the_released_code_starts_with_weight_zero_and_restarts_at_zero():
    # S1 = 0 * .65              = 0
    # S2 = 0 + .1 * .80         = .080
    # S3 = 0                             other class
    # S4 = 0 + .3 * .95         = .285
    policy = BeemPolicy(weights=(0.0, 0.1, 0.2, 0.3), reset="zero", thresholds=CLOSED)
    assert scores(policy) == close([0.0, 0.080, 0.0, 0.285])


def test_the_answer_is_the_leaving_exits_own():
    answers = scan(BeemPolicy(weights=WEIGHTS, thresholds=CLOSED), ROW).answers
    assert answers.argmax(-1).tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize(("layers", "cost", "most"), [(24, 0.1, 27.6), (12, 0.4, 26.4)], ids=["BERT-large", "ALBERT-base"])
def test_the_highest_score_of_the_released_weights(layers, cost, most):
    # .1 * (0 + 1 + ... + 23) = .1 * 276 = 27.6;   .4 * (0 + 1 + ... + 11) = .4 * 66 = 26.4
    weights = tuple(cost * index for index in range(layers))
    policy = BeemPolicy(weights=weights, thresholds=(None,) * (layers - 1))
    assert policy.highest_threshold == pytest.approx(most, rel=1e-5)
    certain = torch.tensor([[1e4, -1e4]]).expand(1, layers, 2)
    assert scores(policy, certain)[-1] == pytest.approx(most, rel=1e-6)
    with pytest.raises(PolicyError, match=f"from 0 to {most:g}"):
        policy.with_thresholds(most + 0.1)


@given(
    factor=st.sampled_from([2.0**power for power in range(-8, 9)]),
    seed=st.integers(0, 1000),
    reset=st.sampled_from(["self", "zero"]),
    vote=st.sampled_from(["probability", "margin", "log-odds"]),
)
def test_scaling_weights_and_thresholds_together_changes_nothing(factor, seed, reset, vote):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 4, 3, generator=generator).cumsum(1)
    weights = torch.rand(4, generator=generator).add(0.1).tolist()
    thresholds = [share * weight for share, weight in zip((0.6, 0.9, 1.2), weights[:3], strict=True)]
    first = BeemPolicy(weights=tuple(weights), thresholds=tuple(thresholds), reset=reset, vote=vote)
    second = BeemPolicy(
        weights=tuple(factor * w for w in weights), thresholds=tuple(factor * t for t in thresholds), reset=reset, vote=vote
    )
    assert exits_of(first, logits) == exits_of(second, logits)
    assert torch.equal(factor * scan(first, logits).scores, scan(second, logits).scores)  # powers of two round nothing


@given(factor=st.floats(0.01, 100.0))
def test_scaling_by_any_factor_changes_nothing_away_from_the_threshold(factor):
    thresholds = (0.2, 0.2, 0.3)  # .065 < .2 <= .225: the second exit
    scaled = BeemPolicy(weights=tuple(factor * w for w in WEIGHTS), thresholds=tuple(factor * t for t in thresholds))
    assert exits_of(scaled, ROW) == exits_of(BeemPolicy(weights=WEIGHTS, thresholds=thresholds), ROW) == [1]


def mixed_rows():
    return torch.randn(200, 5, 3, generator=torch.Generator().manual_seed(3)).cumsum(1)


@pytest.mark.parametrize(("vote", "single"), [("probability", ConfidencePolicy), ("margin", MarginPolicy)])
def test_without_memory_and_weights_it_is_the_rule_of_one_exit(vote, single):
    # decay 0: S_i = 0 * S_(i-1) + 1 * C_i = C_i, whether exits agree or not
    thresholds = (0.9, 0.8, 0.7, 0.6)
    policy = BeemPolicy(weights=(1.0,) * 5, thresholds=thresholds, decay=0.0, vote=vote)
    logits = mixed_rows()
    assert torch.equal(scan(policy, logits).scores, scan(single(thresholds=thresholds), logits).scores)
    assert len(set(exits_of(policy, logits))) == 5


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_with_equal_weights_and_certain_exits_it_is_patience_plus_one(patience):
    # C_i = 1 and w_i = 1: S_i is the length of the chain, PABEE's counter is that length minus one
    logits = 1e4 * torch.nn.functional.one_hot(mixed_rows().argmax(-1), 3).float()
    beem = BeemPolicy(weights=(1.0,) * 5, thresholds=(patience + 1.0,) * 4)
    pabee = PatiencePolicy(thresholds=(patience,) * 4)
    assert torch.equal(scan(beem, logits).scores, scan(pabee, logits).scores + 1)
    assert exits_of(beem, logits) == exits_of(pabee, logits)
    assert len(set(exits_of(beem, logits))) > 1


def test_decay_keeps_a_share_of_the_chain():
    # S1 = .065; S2 = .5 * .065 + .16 = .1925; S3 = .27; S4 = .5 * .27 + .38 = .515
    policy = BeemPolicy(weights=WEIGHTS, thresholds=CLOSED, decay=0.5)
    assert scores(policy) == close([0.065, 0.1925, 0.270, 0.515])


def test_votes_by_margin_and_by_log_odds():
    # margin 2p - 1: .30, .60, .80, .90.   S = .03 | .03 + .12 = .15 | .24 | .24 + .36 = .60
    assert scores(BeemPolicy(weights=WEIGHTS, thresholds=CLOSED, vote="margin")) == close([0.03, 0.15, 0.24, 0.60])
    # log-odds: log(.65/.35) = .6190392, log(4) = 1.3862944, log(9) = 2.1972246, log(19) = 2.9444390
    # S = .0619039 | + .2772589 = .3391628 | .6591674 | + 1.1777756 = 1.8369430
    expected = [0.0619039, 0.3391628, 0.6591674, 1.8369430]
    assert scores(BeemPolicy(weights=WEIGHTS, thresholds=CLOSED, vote="log-odds")) == pytest.approx(expected, abs=1e-5)


def test_a_muted_exit_neither_votes_nor_breaks_a_chain():
    # exits 1, 2, 4 say 1, 1, 0; now exit 3 says 0 but is muted, exit 4 says 1: .225 + .4 * .95 = .605
    row = two_class_row((0.65, 0.80, 0.90, 0.95), (1, 1, 0, 1))
    policy = BeemPolicy(weights=WEIGHTS, thresholds=CLOSED, muted=(2,))
    assert scores(policy, row) == close([0.065, 0.225, -torch.inf, 0.605])


def test_with_many_labels_the_least_sure_label_votes_and_all_must_agree():
    # two labels with probabilities (.9, .2), (.8, .3), (.8, .6): sets {a}, {a}, {a, b}
    # least sure: min(.9, .8) = .8; min(.8, .7) = .7; min(.8, .6) = .6
    # S = 1 * .8 | .8 + 1 * .7 = 1.5 | other set: 1 * .6
    logits = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.8, 0.6]]).logit()[None]
    policy = BeemPolicy(weights=(1.0, 1.0, 1.0), thresholds=(None, None), problem_type=MULTI_LABEL)
    assert scores(policy, logits) == close([0.8, 1.5, 0.6])


def trace_with_accuracies():
    """8 rows, 4 exits after layers 1, 2, 4, 8, right on 4, 6, 7 and 8 rows."""
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
    right = torch.nn.functional.one_hot(labels, 2).float()
    exits = [torch.cat([right[:count], right[count:].flip(-1)]) for count in (4, 6, 7, 8)]
    return ExitTrace(logits=torch.stack(exits, 1), labels=labels, exit_layers=(1, 2, 4, 8))


def test_weights_from_cost_are_lambda_times_the_layer():
    assert BeemCostPolicy.from_trace(trace_with_accuracies()).weights == pytest.approx((0.1, 0.2, 0.4, 0.8))
    assert BeemCostPolicy.from_trace(trace_with_accuracies(), layer_cost=0.5).weights == (0.5, 1.0, 2.0, 4.0)


def test_weights_from_accuracy_are_what_each_exit_gets_right():
    make = BeemAccuracyPolicy.from_trace
    assert make(trace_with_accuracies()).weights == (4 / 8, 6 / 8, 7 / 8, 8 / 8)
    # sum 25/8: 4/25, 6/25, 7/25, 8/25
    assert make(trace_with_accuracies(), normalize="sum").weights == pytest.approx((0.16, 0.24, 0.28, 0.32))
    assert make(trace_with_accuracies(), normalize="max").weights == (0.5, 0.75, 0.875, 1.0)


@pytest.mark.parametrize(
    ("cls", "options", "field"),
    [
        (BeemPolicy, {}, "weights"),
        (BeemCostPolicy, {"layer_cost": 0}, "layer_cost"),
        (BeemCostPolicy, {"layer_cost": float("nan")}, "layer_cost"),
        (BeemCostPolicy, {"layer_cost": True}, "layer_cost"),
        (BeemCostPolicy, {"lambda_": 0.1}, "lambda_"),
        (BeemAccuracyPolicy, {"normalize": "mean"}, "normalize"),
        (BeemAccuracyPolicy, {"layer_cost": 0.1}, "layer_cost"),
        (BeemAccuracyPolicy, {"thresholds": (0.1, 0.1, 0.1)}, "thresholds"),
    ],
)
def test_options_that_do_not_belong_are_refused(cls, options, field):
    with pytest.raises(PolicyError) as caught:
        cls.from_trace(trace_with_accuracies(), **options)
    assert caught.value.field == field


def test_weights_from_accuracy_are_right_answers_and_not_agreement_with_the_last_exit():
    # labels 0 0 0 0; exits are right on 3, 1 and 2 rows; the last agrees with exit 1 on one row, with exit 2 on two
    says = torch.tensor([[0, 1, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]])
    trace = ExitTrace(
        logits=torch.nn.functional.one_hot(says, 2).float(), labels=torch.zeros(4, dtype=torch.long), exit_layers=(1, 2, 3)
    )
    assert BeemAccuracyPolicy.from_trace(trace).weights == (3 / 4, 1 / 4, 2 / 4)
    assert BeemAccuracyPolicy.from_trace(trace, normalize="max").weights == pytest.approx((1.0, 1 / 3, 2 / 3))


# Theorem 3.1: q_i < a / (a + (1/p - 1) b^(i-1)); here p = .1, so 1/p - 1 = 9.
def test_the_theorems_bound_with_constants_of_one_is_the_last_error():
    # 1 / (1 + 9) = .1 at every exit
    assert FinalLayerError(paired=False).bound(0.1, 6) == pytest.approx([0.1] * 5)


def test_the_theorems_bound_falls_with_a_large_b():
    # i = 1: 1 / (1 + 9) = .1;   i = 5: 1 / (1 + 9 * 1.2^4) = 1 / (1 + 9 * 2.0736) = 1 / 19.6624 = .0509
    bound = FinalLayerError(paired=False, b=[1.2] * 5).bound(0.1, 6)
    assert bound[0] == pytest.approx(0.1)
    assert bound[4] == pytest.approx(0.0509, abs=5e-5)
    assert (bound[1:] < bound[:-1]).all()


def test_the_theorems_bound_rises_with_a_small_b():
    # i = 5: 1 / (1 + 9 * .9^4) = 1 / (1 + 9 * .6561) = 1 / 6.9049 = .1448
    assert FinalLayerError(paired=False, b=[0.9] * 5).bound(0.1, 6)[4] == pytest.approx(0.1448, abs=5e-5)


def test_the_theorems_bound_with_its_own_constant_a_at_each_exit():
    # a = 2: 2 / (2 + 9) = .1818;   a = .5: .5 / (.5 + 9) = .0526
    bound = FinalLayerError(paired=False, a=[2.0, 0.5]).bound(0.1, 3)
    assert bound == pytest.approx([2 / 11, 0.5 / 9.5])


@pytest.mark.parametrize(("error", "bound"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_theorems_bound_at_its_ends(error, bound):
    assert FinalLayerError(paired=False).bound(error, 3) == pytest.approx([bound, bound])
