"""Losses of leaving early, and how a test of them is planned, by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from hf_earlyexit.calibration.evidence import hoeffding_bentkus_p
from hf_earlyexit.calibration.quality import find_metric
from hf_earlyexit.calibration.risks import BET, COUNT, HOEFFDING_BENTKUS, PAIRS, RISKS, Losses, Plan, Tally, losses_of
from hf_earlyexit.problem_types import SINGLE_LABEL
from tests.samples import learned_trace

DROPS = Losses(np.zeros((1, 2)), -1.0, 1.0)


@pytest.mark.parametrize("risk", RISKS)
def test_whoever_runs_through_all_layers_loses_nothing(risk):
    """Also under a rule that answers something else there: what is served at the last layer is the full model's answer."""
    trace = learned_trace(50)
    answers = trace.logits.clone()
    answers[:, -1] = -answers[:, -1]
    losses = losses_of(risk, trace, answers, find_metric("accuracy", SINGLE_LABEL), None).values
    assert np.abs(losses[:, 0]).sum() > 0
    assert not losses[:, -1].any()
    assert torch.equal(answers[:, -1], -trace.logits[:, -1])


def test_gains_are_overlooked_where_rows_with_a_loss_are_counted():
    tally = Tally(np.array([-1.0, 0.0, 0.5, 1.0]), np.array([50.0, 45.0, 3.0, 2.0]))
    assert tally.total == -46.5
    assert DROPS.p_value(tally, 0.1, Plan(COUNT)) == pytest.approx(binom.cdf(5, 100, 0.1))
    assert DROPS.p_value(tally, 0.1, Plan(HOEFFDING_BENTKUS)) == hoeffding_bentkus_p(3.5, 100, 0.1)


def test_a_bet_is_planned_as_if_one_more_row_had_lost():
    """Rows without any loss would have the gambler bet all he has; the more of them, the more he may."""
    values = Losses(np.array([[0.25, 0.0]]), -1.0, 1.0)  # not whole, so a bet it must be

    def planned(count, lost=0.25):
        return values.plan(Tally(np.array([0.0, lost]), np.array([count * 0.95, count * 0.05])), 200, 0.05, 0.05)

    def growth(share, count):  # on the unit interval: no loss is 1/2, the one seen .625, a whole one 1, the limit .525
        bet = share / (1 - 0.525)
        seen = [(count * 0.95, 0.5), (count * 0.05, 0.625), (1, 1.0)]
        return sum(times * math.log1p(bet * (0.525 - loss)) for times, loss in seen) / (count + 1)

    shares = np.linspace(0.05, 0.95, 19)
    few, many = planned(200.0), planned(1e9)
    assert few.test == many.test == BET
    assert many.number == pytest.approx(0.95)
    assert few.number == pytest.approx(max(shares, key=lambda share: growth(share, 200)))
    assert few.number < many.number


def test_a_plan_is_made_for_rows_that_can_be_certified():
    """A setting that seems to lose more than the limit, with few rows to tell: planned as if it lost half of it."""
    losses = Losses(np.array([[0.3, 0.0]]), 0.0, 1.0)
    lossy = losses.plan(Tally(np.array([0.0, 0.3]), np.array([80.0, 20.0])), 3000, 0.02, 0.05)
    assert lossy == losses.plan(Tally(np.array([0.0, 0.3, 1.0]), np.array([978.0, 6.0, 1.0])), 3000, 0.02, 0.05)._replace(
        number=lossy.number
    )
    assert lossy.test == BET


def test_a_credit_is_planned_for_rows_that_can_be_certified():
    """As many gains, and losses far above the limit or just at what might be certified: the same credit."""
    losses = Losses(np.array([[1.0, 0.0]]), -1.0, 1.0)

    def planned(lost):
        return losses.plan(Tally(np.array([-1.0, 0.0, 1.0]), np.array([40.0, 3960.0 - lost, lost])), 3000, 0.02, 0.05)

    assert planned(2000.0) == planned(400.0) == planned(110.0)

    def planned_for_few(lost):
        return losses.plan(Tally(np.array([-1.0, 0.0, 1.0]), np.array([3.0, 997.0 - lost, lost])), 300, 0.05, 0.1)

    assert planned_for_few(200.0) == planned_for_few(60.0) == planned_for_few(29.0)
    assert planned(400.0).test == PAIRS
    assert planned(400.0).number >= 7


def test_bounded_losses_that_lie_near_the_ends_are_tested_by_their_sum():
    """Losses of .95: the binomial test takes them for whole ones, a bet pays for not knowing that they are not."""
    losses = Losses(np.array([[0.95, 0.0]]), 0.0, 1.0)
    seen = Tally(np.array([0.0, 0.95]), np.array([2880.0, 120.0]))
    plan = losses.plan(seen, 3000, 0.05, 0.05)
    assert plan.test == HOEFFDING_BENTKUS
    p_values = {test: losses.p_value(seen, 0.05, Plan(test, 0.5)) for test in (COUNT, BET, HOEFFDING_BENTKUS)}
    assert min(p_values, key=p_values.get) == HOEFFDING_BENTKUS
