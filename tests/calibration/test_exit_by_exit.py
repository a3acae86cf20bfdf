"""Thresholds chosen exit by exit, rule after rule, against loops that anybody can check."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_earlyexit.calibration import exit_by_exit
from hf_earlyexit.calibration.exit_by_exit import LeaverRule, falling, per_exit_curve, summable, thresholds_by_rule
from hf_earlyexit.calibration.search import exits_taken
from tests.calibration.test_search import SEEDS, SIZES, case, naive_exit


def naive_per_exit(scores, errors, rule, lowest):
    """For each exit in order, the lowest observed score at which its leavers satisfy the rule, or nan."""
    staying, chosen = list(range(len(scores))), []
    for index in range(scores.shape[1] - 1):
        best = np.nan
        for threshold in sorted({scores[row, index] for row in staying if scores[row, index] >= lowest}):
            leavers = [row for row in staying if scores[row, index] >= threshold]
            if len(leavers) >= rule.min_leavers and allowed(rule, errors[leavers, index], errors[leavers, -1], index):
                best = threshold
                break
        chosen.append(best)
        staying = [row for row in staying if not scores[row, index] >= best]
    return np.array(chosen)


def allowed(rule, mine, last, index):
    """Whether rows with these errors may leave, as the rule's words have it."""
    if rule.bound is None:
        excess = mine - last
        return excess.sum() + rule.sigmas * np.sqrt((excess**2).sum()) <= rule.slack * len(mine) + 1e-9
    rate = mine.mean()
    return rate + rule.sigmas * np.sqrt(rate * (1 - rate) / len(mine)) < rule.bound[index] + rule.slack


def of_rule(scores, errors, rule, lowest=0.0, counts=False):
    """Thresholds of one rule."""
    return next(thresholds_by_rule(scores, errors, [rule], lowest, counts))[0]


RULES = st.builds(
    lambda paired, seed, slack, sigmas, least: LeaverRule(
        None if paired else np.random.default_rng(seed).random(5), slack, sigmas, least
    ),
    st.booleans(),
    SEEDS,
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 2.0]),
    st.integers(0, 5),
)


@given(
    seed=SEEDS,
    **SIZES,
    ties=st.booleans(),
    counts=st.booleans(),
    shares=st.booleans(),
    muted=st.sets(st.integers(0, 4)),
    rules=st.lists(RULES, min_size=1, max_size=5),
    block=st.sampled_from([1, 3, 256]),
)
def test_every_rule_of_a_series_takes_the_rows_of_the_slow_reference(
    seed, rows, exits, ties, counts, shares, muted, rules, block
):
    scores, quality, cost = case(seed, rows, exits, counts, ties, muted)
    if shares:
        quality = np.random.default_rng(seed).integers(0, 8, quality.shape) / 7
    errors, lowest = 1 - quality, 1.0 if counts else 0.0
    with mock.patch.object(exit_by_exit, "BLOCK", block):
        made = thresholds_by_rule(scores, errors, rules, lowest, counts)
        series = [(vector, leaving.left.copy()) for vector, leaving in made]
        curve = per_exit_curve(scores, quality, cost, rules, lowest, counts)
    for place, (rule, (vector, left)) in enumerate(zip(rules, series, strict=True)):
        wanted = naive_per_exit(scores, errors, rule, lowest)
        assert np.isnan(vector).tolist() == np.isnan(wanted).tolist()
        assert left.tolist() == exits_taken(scores, vector).tolist() == [naive_exit(row, wanted) for row in scores]
        if counts:
            assert np.array_equal(vector, wanted, equal_nan=True)
        assert np.array_equal(curve.thresholds[place + 1], vector, equal_nan=True)
        gains = quality[np.arange(rows), left] - quality[:, -1]
        assert curve.cost[place + 1] == pytest.approx(cost[left].mean())
        assert curve.quality[place + 1] == pytest.approx(quality[:, -1].mean() + gains.mean())
        assert curve.standard_error[place + 1] == pytest.approx(gains.std() / np.sqrt(rows), abs=1e-9)


def test_rules_that_go_to_and_fro_keep_count_of_who_reaches_an_exit():
    for seed in range(30):
        draw = np.random.default_rng(seed)
        scores, errors = draw.random((24, 4)), (draw.random((24, 4)) < 0.4).astype(float)
        slacks = draw.permutation([0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.05, 0.1])
        rules = [LeaverRule(None, slack=float(slack)) for slack in slacks]
        with mock.patch.object(exit_by_exit, "BLOCK", 3):
            for rule, (vector, leaving) in zip(rules, thresholds_by_rule(scores, errors, rules, 0.0, False), strict=True):
                wanted = naive_per_exit(scores, errors, rule, 0.0)
                assert leaving.left.tolist() == exits_taken(scores, wanted).tolist() == exits_taken(scores, vector).tolist()


def test_the_reserve_of_a_rate_is_smallest_where_all_err():
    """1.1 is allowed: all four err, which is 1 with no reserve at all, while 3 of 4 would need 2 x 0.22 to spare."""
    scores, errors = np.array([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.6, 0.0]]), np.array([[1.0, 0.0]] * 4)
    with mock.patch.object(exit_by_exit, "BLOCK", 1):
        assert of_rule(scores, errors, LeaverRule(np.array([0.1]), slack=1.0, sigmas=2.0)) == pytest.approx([0.6])


def test_the_reserve_of_the_paired_rule_by_hand():
    # one row worse than the last exit, then rows better: sums 1 0 -1 -2 -3, one standard error 1 1.4 1.7 2 2.2
    excess = np.array([1.0, -1.0, -1.0, -1.0, -1.0])
    sums = np.arange(1, 6), excess.cumsum(), (excess * excess).cumsum()
    assert LeaverRule(None).holds(*sums, 0).tolist() == [False, True, True, True, True]
    assert LeaverRule(None, sigmas=1.0).holds(*sums, 0).tolist() == [False, False, False, True, True]
    assert LeaverRule(None, min_leavers=4).holds(*sums, 0).tolist() == [False, False, False, True, True]


def test_an_exit_whose_error_is_not_monotone_takes_all_it_may():
    # errors in order of leaving 1 0 0 0: rates 1, 1/2, 1/3, 1/4; only all four together are below .3
    scores = np.array([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.6, 0.0]])
    errors = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert of_rule(scores, errors, LeaverRule(np.array([0.3]))) == pytest.approx([0.6])


def test_equal_scores_leave_together_or_not_at_all():
    # two rows share the score .8 and one of them errs: 1/2 is above the bound, so nobody leaves at .8
    scores = np.array([[0.9, 0.0], [0.8, 0.0], [0.8, 0.0]])
    errors = np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    found = of_rule(scores, errors, LeaverRule(np.array([0.2])))
    assert found == pytest.approx([0.85])  # halfway to whoever stays, as new rows have other scores


@pytest.mark.parametrize("values", [[3.0, -1.0, 0.0], [1e-9, 0.3, -7.1], [1e12, 1 / 3, 1e-3], [0.0, 0.0]])
def test_sums_are_exact_in_whatever_order_they_are_taken(values):
    draw = np.random.default_rng(0)
    many = draw.choice(values, 10_000) * draw.choice([1.0, draw.random()], 10_000)
    rounded = summable(many)
    assert np.abs(rounded - many).max() <= 2.0**-52 * np.abs(many).max() * len(many)
    assert len({float(np.cumsum(draw.permutation(rounded))[-1]) for _ in range(20)}) == 1
    assert summable(np.rint(many / 1e3)).tolist() == np.rint(many / 1e3).tolist()


def test_a_series_of_rules_looks_at_few_rows_again():
    """Far less work than every rule by itself: the rows whose place changes between neighbours are few."""
    draw = np.random.default_rng(0)
    right = draw.random((4000, 6)) < np.linspace(0.6, 0.95, 6)
    scores, errors = draw.random((4000, 6)) * 0.7 + right * 0.3, 1.0 - right
    rules = [LeaverRule(None, slack=float(slack)) for slack in np.geomspace(1e-3, 0.3, 60)]
    counted, change = [], exit_by_exit._Exit.change

    def changing(here, come, gone):
        counted.append(len(come) + len(gone))
        return change(here, come, gone)

    with mock.patch.object(exit_by_exit._Exit, "change", changing):
        assert len({leaving.left.tobytes() for _, leaving in thresholds_by_rule(scores, errors, rules, 0.0, False)}) > 40
    assert sum(counted) < 0.1 * 60 * 5 * 4000


@pytest.mark.parametrize("kind", ["float32", "few", "whole", "fine", "huge"])
def test_values_fall_in_their_order(kind):
    draw = np.random.default_rng(0)
    values = draw.standard_normal(3000).astype(np.float32).astype(np.float64)
    if kind == "few":
        values = np.round(values)
    elif kind == "whole":
        values = draw.integers(0, 100_000, 3000).astype(np.float64)
    elif kind == "fine":
        values = 1 + 1e-12 * draw.random(3000)  # float32 holds them all as 1
    elif kind == "huge":
        values = 1e300 * values
    values[::7] = -np.inf
    values[3::11] = 0.0
    values[5::13] = -0.0
    order = falling(values)
    assert sorted(order.tolist()) == list(range(3000))
    assert (np.diff(values[order[np.isfinite(values[order])]]) <= 0).all()
    assert np.isneginf(values[order[np.isfinite(values).sum() :]]).all()


def test_no_values_have_an_order():
    assert falling(np.empty(0)).shape == (0,)
