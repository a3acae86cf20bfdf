"""A policy may answer something else than the exit it leaves at; quality is that of its answers."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.metrics import matthews_corrcoef
from torch import Tensor

from hf_earlyexit.calibration import LayerBudget, MaxDrop, replay
from hf_earlyexit.policies import POLICIES, ExitPolicy, scanning
from hf_earlyexit.problem_types import REGRESSION
from tests.samples import learned_trace

from . import calibrate


class Sum(NamedTuple):
    total: Tensor
    seen: Tensor


@dataclass(frozen=True, kw_only=True)
class AveragingPolicy(ExitPolicy):
    """Answers the mean of what the exits said so far, and leaves where that is sure."""

    highest_score = 1.0

    def init_state(self, batch_size, num_classes, device):
        return Sum(torch.zeros(batch_size, num_classes), torch.zeros(batch_size))

    def update(self, state, signal, exit_index):
        state = Sum(state.total + signal.logits, state.seen + 1)
        answer = state.total / state.seen[:, None]
        return state, answer.softmax(-1).amax(-1), answer


@pytest.fixture
def policy(monkeypatch):
    POLICIES.names()  # entry points first: what is added below is taken away again
    monkeypatch.setitem(POLICIES._items, "averaging", AveragingPolicy)
    return AveragingPolicy(thresholds=(None,) * 3)


def means(trace):
    """The mean answers `[N, E, C]`, and whether they are right `[N, E]`."""
    answers = trace.logits.cumsum(1) / torch.arange(1, 5)[:, None]
    return answers, (answers.argmax(-1) == trace.labels[:, None]).double().numpy()


def test_rows_are_answered_alike_however_many_are_scanned_at_a_time(policy, monkeypatch):
    trace, muting = learned_trace(50), AveragingPolicy(thresholds=(None,) * 3, muted=(1,))
    whole = [one.scan(trace) for one in (policy, muting)]
    assert torch.allclose(whole[0].answers, means(trace)[0])
    assert torch.equal(whole[1].answers[:, 1], trace.logits[:, 1])
    assert not torch.equal(whole[1].answers[:, 2], trace.logits[:, 2])
    monkeypatch.setattr(scanning, "SCANNED", 7)
    for one, before in zip((policy, muting), whole, strict=True):
        assert all(map(torch.equal, one.scan(trace), before))


@pytest.mark.parametrize("per_exit", [True, False])
def test_thresholds_are_chosen_and_judged_by_what_the_policy_answers(policy, per_exit):
    trace = learned_trace(400, seed=2)
    answers, right = means(trace)
    found = calibrate(trace, policy, MaxDrop(0.02), per_exit=per_exit, keep_weak_exits=True)
    taken = found.policy.decide(found.policy.scan(trace).scores).numpy()
    by_answers, by_exits = (part[np.arange(400), taken].mean() for part in (right, trace.quality.numpy()))
    assert found.quality == pytest.approx(by_answers)
    assert found.quality != pytest.approx(by_exits)  # the test would see the other
    assert found.full_quality == pytest.approx(trace.quality[:, -1].mean().item())  # the model's own last exit
    assert [report.quality for report in found.exits] == pytest.approx(right.mean(0))
    for cost, quality, thresholds in found.curve[:: max(len(found.curve) // 9, 1)]:
        taken = found.policy.with_thresholds(thresholds).decide(answers.softmax(-1).amax(-1)).numpy()
        assert (cost, quality) == pytest.approx(((taken + 1).mean(), right[np.arange(400), taken].mean()))


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
@pytest.mark.parametrize("answers_itself", [True, False])
def test_so_is_what_other_rows_can_be_expected_to_get(policy, metric, answers_itself):
    trace = learned_trace(400, seed=2)
    options = {"policy": policy if answers_itself else "confidence", "target": MaxDrop(0.05), "metric": metric}
    early, layers = torch.empty(400, dtype=torch.long), 0
    for fold in torch.randperm(400, generator=torch.Generator().manual_seed(1)).tensor_split(2):
        others = torch.ones(400, dtype=torch.bool).index_fill(0, fold, False)
        chosen, part = calibrate(trace.select(others), folds=0, **options).policy, trace.select(fold)
        scores, answers = chosen.scan(part)
        taken = chosen.decide(scores)
        early[fold], layers = answers[torch.arange(200), taken].argmax(-1), layers + int((taken + 1).sum())
    found = calibrate(trace, folds=2, **options).expected
    full = trace.logits[:, -1].argmax(-1)
    if metric == "accuracy":
        gain = (early == trace.labels).double() - (full == trace.labels).double()
        assert found.difference == pytest.approx(float(gain.mean()))
        assert found.standard_error == pytest.approx(float(gain.std(correction=0)) / 20)
    else:
        assert found.difference == pytest.approx(
            matthews_corrcoef(trace.labels, early) - matthews_corrcoef(trace.labels, full)
        )
    assert found.difference != 0  # the test would see the full model
    assert found.mean_layers == pytest.approx(layers / 400)


def test_so_it_is_in_a_mean_of_something_else():
    trace = learned_trace(200, classes=1, problem_type=REGRESSION)
    options = {"policy": "patience", "target": MaxDrop(0.3), "metric": "mae", "options": {"tolerance": 0.3}}
    early = torch.empty(200)
    for fold in torch.randperm(200, generator=torch.Generator().manual_seed(1)).tensor_split(2):
        others = torch.ones(200, dtype=torch.bool).index_fill(0, fold, False)
        chosen, part = calibrate(trace.select(others), folds=0, **options).policy, trace.select(fold)
        scores, answers = chosen.scan(part)
        early[fold] = answers[torch.arange(100), chosen.decide(scores), 0]
    errors = [
        (values.double() - trace.labels.flatten().double()).abs().mean().item() for values in (early, trace.logits[:, -1, 0])
    ]
    assert errors[0] != pytest.approx(errors[1])  # the test would see the full model
    assert calibrate(trace, folds=2, **options).expected.difference == pytest.approx(errors[1] - errors[0])


@pytest.mark.parametrize("per_exit", [True, False])
def test_so_are_they_in_a_metric_that_is_no_mean(policy, per_exit):
    trace = learned_trace(400, seed=2)
    answers, _ = means(trace)
    found = calibrate(trace, policy, MaxDrop(0.02), metric="matthews", per_exit=per_exit, keep_weak_exits=True)
    taken = found.policy.decide(found.policy.scan(trace).scores)
    by_answers, by_exits = (
        matthews_corrcoef(trace.labels, part[torch.arange(400), taken].argmax(-1)) for part in (answers, trace.logits)
    )
    assert found.quality == pytest.approx(by_answers)
    assert found.quality != pytest.approx(by_exits)
    assert min(abs(quality - by_answers) for _, quality, _ in found.curve) < 1e-9


def test_so_is_a_replay_on_other_rows(policy):
    trace = learned_trace(400, seed=3)
    answers, right = means(trace)
    policy = policy.with_thresholds((0.6, None, 0.7))
    done = replay(policy, trace)
    taken = policy.decide(answers.softmax(-1).amax(-1)).numpy()
    assert done.quality == pytest.approx(right[np.arange(400), taken].mean())
    difference = right[np.arange(400), taken] - trace.quality[:, -1].numpy()
    assert done.standard_error == pytest.approx(difference.std() / 20)
    here = taken == 0
    assert done.exits[0].last_quality_of_leavers == pytest.approx(trace.quality[:, -1].numpy()[here].mean())


def test_muted_exits_are_not_seen_by_calibration():
    """What muted exits say, however loudly, changes no threshold and no figure."""
    for name in ("confidence", "beem-c", "patience"):
        trace = learned_trace(300, seed=4)
        loud = trace.logits.clone()
        loud[:, 1] = 50 * torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
        other = type(trace)(**{**vars(trace), "logits": loud})
        for target in (MaxDrop(0.01), LayerBudget(3.6)):
            for per_exit in (True, False):
                found = [
                    calibrate(rows, name, target, per_exit=per_exit, options={"muted": (1,)}, keep_weak_exits=True)
                    for rows in (trace, other)
                ]
                assert found[0].policy == found[1].policy
                assert found[0].curve == found[1].curve
                assert found[0].policy.thresholds[1] is None
                assert found[0].exits[1].share == 0
