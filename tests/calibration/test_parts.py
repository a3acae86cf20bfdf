"""Some rows of a trace are what `select` makes of them."""

import torch

from hf_earlyexit.calibration.parts import left_with, some
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.trace import SomeRows
from tests.samples import learned_trace

LEARNERS = [name for name in POLICIES.names() if POLICIES.get(name).learns]


def test_rows_that_teach_are_those_of_the_trace():
    trace = learned_trace(60, seed=1)
    places = torch.tensor([7, 3, 50, 11, 12])
    rows, copied = SomeRows(trace, places, trace.quality), trace.select(places)
    for name in ("num_rows", "num_exits", "problem_type", "exit_layers", "costs"):
        assert getattr(rows, name) == getattr(copied, name)
    for name in ("logits", "labels", "quality"):
        assert torch.equal(getattr(rows, name), getattr(copied, name))
    assert set(rows.scalars) == set(copied.scalars)
    for exit_index in range(trace.num_exits):
        here, there = rows.signal(exit_index), copied.signal(exit_index)
        assert torch.equal(here.logits, there.logits)
        assert set(here.scalars) == set(there.scalars)
        assert all(torch.equal(here.scalars[name], there.scalars[name]) for name in here.scalars)
    some_of_them = rows.select([4, 0])
    assert torch.equal(some_of_them.logits, trace.logits[[12, 7]])


def test_a_policy_learns_the_same_from_them_as_from_a_copy():
    trace = learned_trace(400, seed=2)
    places = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:80]
    rows, copied = SomeRows(trace, places, trace.quality), trace.select(places)
    for name in LEARNERS:
        assert POLICIES.get(name).from_trace(rows) == POLICIES.get(name).from_trace(copied)


def test_all_rows_are_not_copied():
    values = torch.arange(12.0).reshape(3, 4)
    assert some(values, None) is values
    assert some(values, torch.tensor([2, 0])).tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]
    assert left_with(values, None, torch.tensor([1, 0, 3])).tolist() == [1, 4, 11]
    assert left_with(values, torch.tensor([2, 0]), torch.tensor([1, 3])).tolist() == [9, 3]
