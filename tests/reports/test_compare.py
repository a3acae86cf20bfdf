"""Thresholds from one half, figures from the other, and nothing leaks between them."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import CalibrationError, DataError
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from hf_earlyexit.reports.compare import compare_policies
from tests.samples import learned_trace


@pytest.fixture(scope="module")
def trace():
    return learned_trace(rows=600)


@pytest.fixture(scope="module")
def comparison(trace):
    return compare_policies(trace, max_drop=0.02)


def test_every_policy_is_compared_or_said_to_be_left_out(comparison):
    assert {*comparison.contenders, *comparison.left_out} == set(POLICIES.names())
    assert set(comparison.left_out) == {"beem"}
    assert "weights" in comparison.left_out["beem"]


def test_figures_are_those_of_the_judging_rows(comparison, trace):
    judging = trace.select(comparison.judging_rows)
    assert comparison.num_choosing + judging.num_rows == trace.num_rows
    for one in comparison.contenders.values():
        assert one.judged.quality == ee.replay(one.chosen.policy, judging).quality
        assert one.chosen.num_rows + one.chosen.num_learning_rows == comparison.num_choosing


def test_the_choosing_half_does_not_see_the_judging_half(comparison, trace):
    """Wrong labels on the judging rows change figures, but no threshold and no choice."""
    labels = trace.labels.clone()
    labels[comparison.judging_rows] = (labels[comparison.judging_rows] + 1) % 3
    spoilt = compare_policies(ee.ExitTrace(**{**vars(trace), "labels": labels}), max_drop=0.02)
    assert spoilt.best.name == comparison.best.name
    for name, one in comparison.contenders.items():
        assert spoilt.contenders[name].chosen == one.chosen
        assert spoilt.contenders[name].judged.full_quality < one.judged.full_quality


def test_curves_hold_the_chosen_setting_and_both_ends(comparison):
    full = comparison.contenders["confidence"].judged.full_quality
    for one in comparison.contenders.values():
        points = list(zip(*(part[::-1].tolist() for part in one.curve[1:]), strict=True))
        assert points == sorted(points)
        assert points[-1] == (4.0, full, 0.0)
        assert any(
            layers == pytest.approx(one.judged.mean_layers) and quality == pytest.approx(one.judged.quality)
            for layers, quality, _ in points
        )
        nearest = min(points, key=lambda point: abs(point[0] - one.judged.mean_layers) + abs(point[1] - one.judged.quality))
        assert nearest[2] == pytest.approx(one.judged.standard_error)


def test_the_best_has_the_fewest_layers_on_the_choosing_half(comparison):
    rules = [one for one in comparison.contenders.values() if one.name != "static"]
    assert comparison.best.chosen.mean_cost == min(one.chosen.mean_cost for one in rules)


def test_of_rules_that_do_the_same_the_plainest_is_the_best():
    logits = torch.eye(2)[torch.arange(200) % 2][:, None].repeat(1, 3, 1) * 9  # every exit is right and sure
    same = compare_policies(ee.ExitTrace(logits=logits, labels=torch.arange(200) % 2, exit_layers=(1, 2, 3)), 0.0)
    assert len({one.chosen.mean_cost for one in same.contenders.values()} & {1.0}) == 1
    assert same.best.name == "confidence"


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_other_problems_are_compared_too(problem):
    found = compare_policies(learned_trace(rows=200, problem_type=problem), max_drop=0.1)
    assert "static" in found.contenders
    assert "beem-calibrated" in found.left_out


def test_few_rows_and_training_rows_are_refused(trace):
    with pytest.raises(DataError, match="at least 40"):
        compare_policies(trace.select(range(39)))
    with pytest.raises(CalibrationError, match="train"):
        compare_policies(learned_trace(rows=200, split="train"))


def test_the_seed_draws_the_halves(trace, monkeypatch):
    monkeypatch.setattr(POLICIES, "names", lambda: ["confidence"])
    first, again, other = (compare_policies(trace, seed=seed).judging_rows for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
