"""The exact test of losses and gains, against chances counted out one by one."""

import math
import time

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from hf_earlyexit.calibration import paired
from hf_earlyexit.calibration.evidence import betting_p, binomial_p
from hf_earlyexit.calibration.paired import CREDITS, best_credit, paired_p


def chances(rows, limit, gain_share):
    """Chance of every number of losses and gains `[n + 1, n + 1]` where losses exceed gains by just the limit."""
    losses, gains = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    counts = np.stack([losses, gains, rows - losses - gains], -1)
    shares = [gain_share + limit, gain_share, max(0.0, 1 - 2 * gain_share - limit)]
    return np.where(counts[..., 2] >= 0, multinomial.pmf(counts.clip(min=0), rows, shares), 0.0)


def by_counting(losses, gains, rows, limit, credit):
    """The p-value, but for what happens between 400 shares of gains."""
    every_loss, every_gain = np.meshgrid(np.arange(rows + 1), np.arange(rows + 1), indexing="ij")
    as_small = 10 * every_loss - credit * every_gain <= 10 * losses - credit * gains
    shares = np.append(0.0, np.geomspace(1e-4, (1 - limit) / 2, 400))
    return max(float(chances(rows, limit, share)[as_small].sum()) for share in shares)


@pytest.mark.parametrize("credit", CREDITS)
@pytest.mark.parametrize(("rows", "limit"), [(12, 0.3), (25, 0.1)])
def test_it_is_the_largest_chance_that_any_share_of_gains_allows(rows, limit, credit):
    for losses, gains in ((0, 0), (1, 0), (1, 2), (2, 1), (3, 5), (0, 4)):
        counted, found = by_counting(losses, gains, rows, limit, credit), paired_p(losses, gains, rows, limit, credit)
        assert counted * (1 - 1e-6) <= found <= max(min(1.0, counted * 1.0225), paired.SMALL)


@pytest.mark.parametrize("credit", CREDITS)
def test_it_errs_no_more_often_than_it_says(credit):
    """Whatever the share of gains, for every level, counted over all that 25 rows can do."""
    rows, limit = 25, 0.15
    p_values = np.ones((rows + 1, rows + 1))
    for losses in range(rows + 1):
        for gains in range(rows + 1 - losses):
            p_values[losses, gains] = paired_p(losses, gains, rows, limit, credit)
    for share in (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.425):
        chance = chances(rows, limit, share)
        for level in (0.01, 0.05, 0.1, 0.3):
            assert chance[p_values <= level].sum() <= level


def test_the_worst_share_is_found_among_many_rows():
    for losses, gains, rows, limit, credit in ((5, 5, 1000, 0.01, 8), (4, 2, 1000, 0.01, 7), (56, 6, 3000, 0.02, 9)):
        ends = np.append(0.0, np.geomspace(1e-5, 0.49, 3000))
        score = 10 * losses - credit * gains
        worst = paired._tails(score, rows, ends + limit, ends, credit).max()
        one_by_one = [
            binom.pmf(np.arange(rows), rows, share)
            @ binom.cdf((score + credit * np.arange(rows)) // 10, rows - np.arange(rows), (share + limit) / (1 - share))
            for share in (0.001, 0.02)
        ]
        assert paired._tails(score, rows, np.array([0.001, 0.02]) + limit, np.array([0.001, 0.02]), credit) == pytest.approx(
            one_by_one, rel=1e-8
        )
        assert worst <= paired_p(losses, gains, rows, limit, credit) <= worst * 1.021
        assert worst > 1.1 * paired._tails(score, rows, np.array([limit]), np.array([0.0]), credit)[0]  # gains matter


@pytest.mark.parametrize(("losses", "gains", "rows", "limit", "credit"), [(5, 2, 1000, 0.01, 7), (60, 40, 2000, 0.02, 9)])
def test_no_closer_than_it_matters(losses, gains, rows, limit, credit):
    """Held against levels, it is on the right side of each, and never less than it is."""
    exact = paired_p(losses, gains, rows, limit, credit)
    for lowest in (exact / 8, exact / 1.1, exact * 1.05, exact * 3):
        for highest in (lowest, lowest * 2):
            found = paired_p(losses, gains, rows, limit, credit, (lowest, highest))
            assert found >= exact / 1.021
            assert (found <= lowest, found <= highest) == (exact <= lowest, exact <= highest)
            assert not lowest < exact < highest or found <= exact * 1.021


def test_many_rows_and_settings_are_certified_at_once():
    """100,000 rows and 400 settings, of which the walk ends at the limit: about half a second of one core."""
    from hf_earlyexit.calibration.certify import Certified, walk_of_rows
    from hf_earlyexit.calibration.risks import Losses

    draw, rows = np.random.default_rng(0), 100_000
    scores = np.tile(draw.random(rows)[:, None], (1, 6))
    lost = draw.random(rows) < 0.1 * (1 - scores[:, 0])
    losses = np.tile((lost - 1.0 * ((draw.random(rows) < 0.005) & ~lost))[:, None], (1, 6))
    losses[:, -1] = 0
    path = np.tile(np.append(np.nan, np.linspace(1, 0, 399))[:, None], (1, 5))
    everybody = {"all rows": np.ones(rows, dtype=bool)}
    start = time.process_time()
    walk = walk_of_rows(
        Certified(0.01, 0.9), Losses(losses, -1.0, 1.0), scores, path, everybody, (scores[:20_000], losses[:20_000])
    )
    chosen = walk.last_certified()
    assert time.process_time() - start < 5
    assert walk.plans[0].test == "exact paired"
    assert 100 < chosen < 300
    assert walk.promise(chosen, 20_000).p_value <= 0.1


def test_without_credit_it_is_the_binomial_test():
    for losses, gains, rows in ((0, 0, 300), (4, 7, 1000), (20, 0, 3000)):
        exact = binomial_p(losses, rows, 0.01)
        assert exact * (1 - 1e-9) <= paired_p(losses, gains, rows, 0.01, 0) <= max(1.02 * exact, paired.SMALL)


def test_gains_count_and_it_is_sharper_than_a_bet():
    """1,000 rows, a limit of .01: 5 losses and 2 gains."""
    values, counts = np.array([0.0, 0.5, 1.0]), np.array([2.0, 993.0, 5.0])
    bets = [betting_p(values, counts, 0.505, share) for share in np.linspace(0.05, 0.95, 19)]
    assert paired_p(5, 2, 1000, 0.01, 7) < 0.03 < 0.05 < binomial_p(5, 1000, 0.01) < min(bets)


def test_the_credit_that_is_planned():
    """None where nothing is gained; more of it the more is; none under which rows without any loss would fail."""
    assert best_credit(5.0, 0.0, 1000, 0.01, 0.05) == 0
    planned = [
        best_credit(gains + rows * 0.005, gains, rows, 0.01, 0.05) for rows, gains in ((1000, 1), (10_000, 20), (10**5, 999))
    ]
    assert planned == sorted(planned)
    assert 5 <= planned[0] <= 7
    assert planned[-1] >= 8
    assert paired_p(0, 0, 300, 0.01, 6) > 0.05 >= paired_p(0, 0, 300, 0.01, 5)
    assert best_credit(3.0, 1.5, 300, 0.01, 0.05) <= 5
    assert best_credit(3.0, 1.5, 300, 0.01, 0.3) > 5


def test_rows_that_are_tested_do_not_choose_how():
    """Settings that fail: no certifying rows with however many gains change the plan that others made."""
    from hf_earlyexit.calibration.certify import Certified, walk_of_rows
    from hf_earlyexit.calibration.risks import Losses

    draw = np.random.default_rng(0)
    scores, path = np.stack([draw.random(2000), np.zeros(2000)], 1), np.append(np.nan, np.linspace(1, 0, 20))[:, None]

    def losses(lost, gained, part=1.0):
        values = np.zeros((2000, 2))
        values[:lost, 0], values[lost : lost + gained, 0] = part, -1
        return values

    everybody = {"all rows": np.ones(2000, dtype=bool)}
    for before, test in (
        (losses(30, 12), "exact paired"),
        (losses(30, 12, 0.7), "betting"),
        (losses(70, 0, 0.95), "Hoeffding-Bentkus"),
    ):
        plans = [
            walk_of_rows(Certified(0.05), Losses(values, -1.0, 1.0), scores, path, everybody, (scores, before)).plans
            for values in (losses(0, 0), losses(20, 0), losses(60, 300), losses(60, 300, 0.3), before)
        ]
        assert plans[0][0].test == test
        assert all(plan == plans[0] for plan in plans)


def test_losses_between_are_taken_for_whole_ones_and_gains_between_for_none():
    """Should rows that are tested have such, planned for whole ones: a promise kept all the same."""
    from hf_earlyexit.calibration.risks import PAIRS, Losses, Plan, Tally

    mixed = Tally(np.array([-1.0, -0.5, 0.0, 0.3, 1.0]), np.array([2.0, 4.0, 989.0, 2.0, 3.0]))
    tested = Losses(np.zeros((1, 2)), -1.0, 1.0).p_value(mixed, 0.01, Plan(PAIRS, 7))
    assert tested == paired_p(5, 2, 1000, 0.01, 7)
    assert math.isclose(mixed.total_lost, 3.6)
