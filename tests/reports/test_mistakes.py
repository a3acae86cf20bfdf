"""The rows that left early and wrong, on a trace small enough to read."""

import torch

import hf_earlyexit as ee
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from hf_earlyexit.reports.mistakes import find_mistakes


def row(*confidences):
    return torch.tensor([[p, 1 - p] for p in confidences]).log()


# exits after layers 2 and 4; a row leaves at the first where it is at least 0.8 sure
TRACE = ee.ExitTrace(
    logits=torch.stack([row(0.9, 0.9), row(0.9, 0.1), row(0.6, 0.3), row(0.85, 0.7)]),
    labels=torch.tensor([0, 1, 0, 1]),
    exit_layers=(2, 4),
)
POLICY = ee.ConfidencePolicy(thresholds=[0.8])


def test_found_by_hand():
    found = find_mistakes(POLICY, TRACE, ["yes", "no"])
    assert (found.num_early, found.num_wrong, found.num_harmed) == (3, 2, 1)
    harmed, wrong_anyway = found.worst
    assert (harmed.row, harmed.layer, harmed.truth, harmed.answer, harmed.last_answer) == (1, 2, "no", "yes", "no")
    assert harmed.harmed
    assert (wrong_anyway.row, wrong_anyway.harmed) == (3, False)
    assert abs(harmed.score - 0.9) < 1e-6


def test_at_most_so_many_are_kept_and_all_are_counted():
    found = find_mistakes(POLICY, TRACE, most=1)
    assert (len(found.worst), found.num_wrong) == (1, 2)
    assert found.worst[0].answer == "0"


def test_many_labels_and_values_are_put_in_words():
    logits = torch.tensor([[[1.0, -1.0], [1.0, 1.0]]])
    labels = torch.tensor([[1.0, 1.0]])
    many = ee.ExitTrace(logits=logits, labels=labels, exit_layers=(1, 2), problem_type=MULTI_LABEL)
    policy = ee.policies.StaticPolicy(thresholds=[1.0], problem_type=MULTI_LABEL)
    (one,) = find_mistakes(policy, many, ["a", "b"]).worst
    assert (one.truth, one.answer, one.last_answer) == ("a, b", "a", "a, b")
    values = ee.ExitTrace(logits=logits[..., :1], labels=labels[:, :1] * 1.25, exit_layers=(1, 2), problem_type=REGRESSION)
    (one,) = find_mistakes(ee.policies.StaticPolicy(thresholds=[1.0], problem_type=REGRESSION), values).worst
    assert (one.truth, one.answer, one.harmed) == ("1.25", "1", False)
