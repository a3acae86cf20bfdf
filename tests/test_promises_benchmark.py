"""The benchmark of promises counts what it says it counts."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_earlyexit import replay
from hf_earlyexit.calibration import Certified, MaxDrop, calibrate
from hf_earlyexit.serving.disagreement import disagreement_bounds
from tests.samples import learned_trace

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """Its modules, by the last part of their names."""
    pytest.importorskip("datasets", reason="datasets is missing, which the benchmarks read rows with (extra: train)")
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield lambda name: importlib.import_module(f"promises_{name}")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("policy", ["confidence", "beem-calibrated"])
def test_a_cell_is_what_calibrate_and_replay_say(benchmark, policy):
    splits = benchmark("splits")
    traces = [learned_trace(900, seed=seed) for seed in (1, 2)]
    rules = {"MaxDrop(0.01)": (MaxDrop(0.01), False), "Certified": (Certified(0.05, 0.9), False)}
    cells = splits.judge(splits.Task("made up", traces, 600), policy, 4, rules)
    drops = {name: [] for name in rules}
    for seed in range(4):
        trace, order = traces[seed % 2], torch.randperm(900, generator=torch.Generator().manual_seed(seed))
        for name, (target, _) in rules.items():
            result = calibrate(trace.select(order[:600]), policy, target, metric="accuracy", seed=seed, folds=0)
            done = replay(result.policy, trace if name == "Certified" else trace.select(order[600:]))
            drops[name].append(done.full_quality - done.quality)
    for name, (target, _) in rules.items():
        assert cells[name]["drop"] == pytest.approx(np.mean(drops[name]))
        assert cells[name]["broken"] == sum(drop > target.drop + 1e-9 for drop in drops[name])
        assert cells[name]["splits"] == 4


def test_streams_all_at_once_are_those_of_the_monitor(benchmark):
    simulated, draw = benchmark("simulated"), np.random.default_rng(0)
    shadowed = draw.integers(0, 400, 200)
    different = draw.binomial(shadowed, 0.06)
    passes = simulated.bound_passes(different, shadowed, 0.05, 0.02)
    one_by_one = [
        disagreement_bounds(k, n, 0.05)[0] > 0.02 for k, n in zip(different.tolist(), shadowed.tolist(), strict=True)
    ]
    assert passes.tolist() == one_by_one
    assert 20 < passes.sum() < 180


def test_the_limit_of_certifying_by_counts(benchmark):
    """By hand: the exact test of 1 % at 95 % from 1,000 rows allows four losses, so 5 / 1,001 of risk at the very most."""
    simulated = benchmark("simulated")

    class Fine:
        risks = np.linspace(0, 0.1, 100_001)

    assert simulated.possible(Fine, 0.01, 0.05, 1000, with_coin=False) == pytest.approx(5 / 1001, abs=1e-5)
    assert simulated.possible(Fine, 0.01, 0.05, 1000) > 5 / 1001
    pool = simulated.Pool("harm")
    used = pool.certified(Certified(0.05, 0.9, risk="harm"), 300, 60)
    assert used.mean() <= simulated.possible(pool, 0.05, 0.1, 300) + 3 * used.std() / 60**0.5


def test_the_limit_of_certifying_by_losses_and_gains(benchmark):
    """Without gains it is that of losses alone; with them no test uses more, and the one that is used comes close."""
    simulated = benchmark("simulated")
    without = simulated.Pool("harm")
    assert not without.gains.any()
    assert simulated.possible_with_gains(without, 0.05, 0.1, 3000) == pytest.approx(
        simulated.possible(without, 0.05, 0.1, 3000), rel=0.03
    )
    pool = simulated.Pool("drop")
    used = pool.certified(Certified(0.05, 0.9), 300, 200).clip(max=0.05)
    most = simulated.possible_with_gains(pool, 0.05, 0.1, 300)
    assert 0.85 * most <= used.mean() <= most + 3 * used.std() / 200**0.5
