"""Losses of leaving early, and how a test of them is planned, by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from hf_earlyexit.calibration.quality import find_metric
from hf_earlyexit.calibration.risks import RISKS, Losses, Tally, losses_of
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
    tally = Tally(np.array([-1.0, 0.0, 1.0]), np.array([50.0, 45.0, 5.0]))
    assert tally.total == -45
    assert DROPS.p_value(tally, 0.1, None) == pytest.approx(binom.cdf(5, 100, 0.1))


def test_a_bet_is_planned_as_if_one_more_row_had_lost():
    """Rows without any loss would have the gambler bet all he has; the more of them, the more he may."""
    values = Losses(np.array([[0.25, 0.0]]), -1.0, 1.0)  # not whole, so a bet it must be
    few, many = (values.plan(Tally(np.array([0.0]), np.array([count])), 100, 0.05) for count in (10.0, 1e9))
    assert many == pytest.approx(0.95)

    def growth(share, count):  # on the unit interval: no loss is 1/2, a whole one 1, the limit .525
        bet = share / (1 - 0.525)
        return (count * math.log1p(bet * 0.025) + math.log1p(bet * (0.525 - 1))) / (count + 1)

    shares = np.linspace(0.05, 0.95, 19)
    assert few == pytest.approx(max(shares, key=lambda share: growth(share, 10)))
    assert few < 0.9
