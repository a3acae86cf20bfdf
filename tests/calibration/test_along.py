"""Losses along a path, counted for all settings at once, against one setting at a time."""

import time

import numpy as np
import pytest

from hf_earlyexit.calibration.along import LossesAlong
from hf_earlyexit.calibration.certify import Certified, walk_of_rows
from hf_earlyexit.calibration.risks import Losses
from hf_earlyexit.calibration.search import exits_taken, means_along, shared_thresholds

ROWS, EXITS, GROUPS = 400, 5, 3


def case(whole=True, seed=0):
    """Scores with ties, a muted exit, losses and groups."""
    draw = np.random.default_rng(seed)
    scores = draw.integers(0, 12, (ROWS, EXITS)) / 10
    scores[:, 1] = -np.inf
    losses = draw.choice([-1.0, 0.0, 1.0], (ROWS, EXITS), p=[0.1, 0.7, 0.2])
    losses = losses if whole else losses * draw.random((ROWS, EXITS))
    losses[:, -1] = 0
    return scores, losses, draw.integers(0, GROUPS, ROWS)


def one_threshold():
    """From all closed down, in no particular order; exits 1 and 2 closed throughout."""
    path = np.full((8, EXITS - 1), np.nan)
    path[1:, [0, 3]] = np.array([1.5, 1.1, 0.9, 0.35, 0.0, 0.55, 0.5])[:, None]
    return path


def each_its_own():
    draw = np.random.default_rng(7)
    path = draw.integers(0, 13, (9, EXITS - 1)) / 10
    path[draw.random(path.shape) < 0.3] = np.nan
    return path


def naive(scores, setting):
    """The first exit whose score reaches its threshold, row by row."""
    reach = [[place for place in range(EXITS - 1) if row[place] >= setting[place]] for row in scores]
    return np.array([places[0] if places else EXITS - 1 for places in reach])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("path", [one_threshold(), each_its_own()], ids=["one threshold", "each its own"])
def test_counts_are_those_of_one_setting_at_a_time(path, whole):
    scores, losses, member = case(whole)
    along = LossesAlong(Losses(losses, -1.0, 1.0), scores, path, member, GROUPS)
    for place, setting in enumerate(path):
        taken = naive(scores, setting)
        assert exits_taken(scores, setting).tolist() == taken.tolist()
        here = losses[np.arange(ROWS), taken]
        assert along.at(place).tolist() == here.tolist()
        for group, tally in enumerate(along.tallies(place)):
            part = here[member == group]
            assert tally.counts.sum() == len(part)
            assert tally.total == pytest.approx(part.sum())
            assert tally.counts[tally.values > 0].sum() == (part > 0).sum()
            assert tally.counts[tally.values < 0].sum() == (part < 0).sum()


@pytest.mark.parametrize("path", [one_threshold(), each_its_own()], ids=["one threshold", "each its own"])
def test_means_are_those_of_one_setting_at_a_time(path):
    scores, losses, _ = case(whole=False)
    means = means_along(path, scores, [losses, losses**2])
    for place, setting in enumerate(path):
        here = losses[np.arange(ROWS), naive(scores, setting)]
        assert [mean[place] for mean in means] == pytest.approx([here.mean(), (here**2).mean()])


def test_which_paths_share_a_threshold():
    open_exits, cuts = shared_thresholds(one_threshold())
    assert open_exits.tolist() == [True, False, False, True]
    assert cuts.tolist() == [np.inf, 1.5, 1.1, 0.9, 0.35, 0.0, 0.55, 0.5]
    assert shared_thresholds(each_its_own()) is None
    assert shared_thresholds(np.array([[0.5, 0.5], [0.4, np.nan]])) is None
    assert shared_thresholds(np.array([[0.5, 0.5], [0.4, 0.3]])) is None
    assert shared_thresholds(np.full((2, 3), np.nan))[1].tolist() == [np.inf, np.inf]


@pytest.mark.parametrize("risk", ["harm", "drop"])
def test_a_long_path_over_many_rows_takes_no_time(risk):
    """400 settings x 100,000 rows x 12 exits, every second row with a loss somewhere and none that ends the walk."""
    draw, rows, settings = np.random.default_rng(0), 100_000, 400
    scores = draw.random((rows, 12))
    losses = (draw.random((rows, 12)) < 0.001).astype(float)
    losses[:, 0] = draw.random(rows) < 0.5
    scores[:, 0] = np.where(losses[:, 0] == 1, 0.0, scores[:, 0])
    if risk == "drop":
        losses -= (draw.random((rows, 12)) < 0.005) & (losses == 0)
    losses[:, -1] = 0
    path = np.repeat(np.linspace(1, 0.01, settings)[:, None], 11, 1)
    everyone = {"all rows": np.ones(rows, dtype=bool)}
    start = time.process_time()
    low = -1.0 if risk == "drop" else 0.0
    walk = walk_of_rows(Certified(0.01, 0.9, risk=risk), Losses(losses, low, 1.0), scores, path, everyone, (scores, losses))
    assert walk.last_certified() == settings - 1
    assert time.process_time() - start < 2  # 0.5 s when idle; setting by setting it takes 4 to 8 s
