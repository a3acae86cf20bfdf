"""Policies that learned other numbers look at the same rows once, and score them as they would alone."""

from dataclasses import replace

import pytest
import torch

from hf_earlyexit.calibration import MaxDrop, calibrate, settings
from hf_earlyexit.calibration.quality import find_metric
from hf_earlyexit.calibration.settings import Pool
from hf_earlyexit.policies import POLICIES, scanning
from hf_earlyexit.policies.looking import Looks
from tests.samples import learned_trace

NAMES = ["beem-calibrated", "reward"]


@pytest.fixture
def looked(monkeypatch):
    """The policies that looked at a trace."""
    looking, of = [], Looks.of
    monkeypatch.setattr(Looks, "of", lambda policy, *args: looking.append(policy) or of(policy, *args))
    return looking


def pool_of(trace):
    return Pool(trace, find_metric(None, trace.problem_type))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_those_of_stepping_exit_by_exit(name, looked, monkeypatch):
    monkeypatch.setattr(scanning, "SCANNED", 64)  # more than one part
    trace = learned_trace(200)
    pool, first = pool_of(trace), POLICIES.get(name).from_trace(trace)
    second = POLICIES.get(name).from_trace(trace.select(range(100)))
    assert first != second
    for policy in (first, second, second.with_thresholds(0.5), first):
        scores, answers = pool.scan(policy)
        assert torch.equal(scores, scanning.scan(policy, trace).scores)
        assert answers is trace.logits
    assert looked == [first]


@pytest.mark.parametrize("name", NAMES)
def test_policies_of_other_exits_look_for_themselves(name, looked):
    trace = learned_trace(200)
    pool, whole = pool_of(trace), POLICIES.get(name).from_trace(trace)
    deaf = replace(whole, muted=(1,))
    for policy in (whole, deaf):
        assert torch.equal(pool.scan(policy).scores, scanning.scan(policy, trace).scores)
    assert looked == [whole, deaf]


@pytest.mark.parametrize("name", NAMES)
def test_folds_look_at_the_rows_once(name, looked):
    calibrate(learned_trace(600), name, MaxDrop(0.01), keep_weak_exits=True, folds=4)
    assert len(looked) == 1


def test_who_learns_and_who_looks_ask_each_exit_once(monkeypatch):
    asked, ask = [], settings.values_by_parts
    monkeypatch.setattr(settings, "values_by_parts", lambda *args: asked.append(args) or ask(*args))
    monkeypatch.setattr(POLICIES.get("beem-calibrated"), "look", None)  # nobody asks once more
    trace = learned_trace(600)
    calibrate(trace, "beem-calibrated", MaxDrop(0.01), keep_weak_exits=True, folds=4)
    assert len(asked) == trace.num_exits


def test_values_of_some_rows_are_theirs(monkeypatch):
    monkeypatch.setattr(scanning, "SCANNED", 64)
    trace, places = learned_trace(200), torch.tensor([150, 3, 70])

    def of_logits(logits):
        return logits.amax(-1), logits.argmax(-1)

    rows, copied = pool_of(trace).rows(places), trace.select(places)
    for exit_index in range(trace.num_exits):
        for found, right in zip(
            rows.row_values(of_logits, exit_index), copied.row_values(of_logits, exit_index), strict=True
        ):
            assert torch.equal(found, right)
