"""When early exit is the wrong tool, the report says so; when it is not, it is quiet."""

import dataclasses

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.reports.advice import doubts, summary
from hf_earlyexit.reports.compare import compare_policies
from tests.samples import learned_trace


@pytest.fixture(scope="module")
def comparison():
    return compare_policies(learned_trace(rows=800), max_drop=0.05)


def found(comparison, **changes):
    judged = dataclasses.replace(comparison.best.judged, **changes)
    return " ".join(doubts(judged, comparison))


def test_a_good_outcome_raises_no_doubt(comparison):
    full = comparison.best.judged.full_quality
    assert found(comparison, mean_layers=1.4, quality=full, standard_error=0.001) == ""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean_layers": 3.9}, "saves hardly anything"),
        ({"quality": 0.5, "standard_error": 0.01}, "More was lost than the permitted"),
        ({"standard_error": 0.05}, "too few to tell a drop of 0.05 from chance; judging would take about 1,600"),
        ({"mean_layers": 4.0}, "Cutting the model off after layer"),
    ],
)
def test_each_doubt_has_its_reason(changes, says, comparison):
    changes = {"standard_error": 0.001, "quality": comparison.best.judged.full_quality, "mean_layers": 1.4, **changes}
    assert says in found(comparison, **changes)


def test_a_better_early_exit_is_pointed_at(comparison):
    exits = list(comparison.best.judged.exits)
    exits[1] = dataclasses.replace(exits[1], quality=1.0)
    assert "exit after layer 2 alone has accuracy 1.0000" in found(comparison, exits=tuple(exits), standard_error=0.001)


def test_a_useless_early_exit_is_called_so():
    """Early exits that guess: nothing can be saved, and the sentence comes from the data, not from a change to it."""
    trace = learned_trace(rows=600, exits=3)
    logits = trace.logits.clone()
    logits[:, :2] = 0.01 * torch.randn(600, 2, 3, generator=torch.Generator().manual_seed(1))
    comparison = compare_policies(ee.ExitTrace(**{**vars(trace), "logits": logits}), max_drop=0.01)
    assert "saves hardly anything" in " ".join(doubts(comparison.best.judged, comparison))


def test_the_summary_tells_the_figures(comparison):
    judged = comparison.best.judged
    told = " ".join(summary("confidence", judged, comparison.judging))
    assert f"{judged.mean_layers:.2f} of 4 layers" in told
    assert f"accuracy {judged.quality:.4f}, the full model {judged.full_quality:.4f}" in told
