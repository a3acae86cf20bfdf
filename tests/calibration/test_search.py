"""The vectorised sweeps against loops that anybody can check."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_earlyexit.calibration.exit_by_exit import LeaverRule, per_exit_curve
from hf_earlyexit.calibration.search import (
    candidates,
    cut_between,
    exits_taken,
    single_threshold_curve,
    sweep,
)

SEEDS = st.integers(0, 10_000)
SIZES = {"rows": st.integers(1, 30), "exits": st.integers(1, 6)}


def case(seed, rows, exits, counts=False, ties=False, muted=()):
    """Scores, quality and cost; float32 values as policies give them."""
    random = np.random.default_rng(seed)
    scores = random.random((rows, exits)).astype(np.float32).astype(float)
    if ties:
        scores = np.round(scores * 4) / 4
    if counts:
        scores = random.integers(0, 4, (rows, exits)).astype(float)
    for index in muted:
        if index < exits - 1:
            scores[:, index] = -np.inf
    return scores, random.integers(0, 2, (rows, exits)).astype(float), np.cumsum(random.random(exits) + 0.1)


def naive_exit(row, threshold):
    """Thresholds: a number, or one per exit with nan for closed ones."""
    thresholds = np.broadcast_to(threshold, len(row) - 1)
    for index, wanted in enumerate(thresholds):
        if row[index] >= wanted:
            return index
    return len(row) - 1


def naive_means(scores, values, threshold):
    taken = [naive_exit(row, threshold) for row in scores]
    return np.mean([value[exit_index] for value, exit_index in zip(values, taken, strict=True)])


@given(seed=SEEDS, **SIZES, ties=st.booleans(), muted=st.sets(st.integers(0, 4)))
def test_the_sweep_is_the_naive_loop(seed, rows, exits, ties, muted):
    scores, quality, cost = case(seed, rows, exits, ties=ties, muted=muted)
    thresholds = np.unique(np.append(np.random.default_rng(seed).random(7), scores[np.isfinite(scores)][:9]))
    costs = np.broadcast_to(cost, scores.shape)
    swept_cost, swept_quality = sweep(scores, [costs, quality], thresholds)
    assert swept_cost == pytest.approx([naive_means(scores, costs, t) for t in thresholds])
    assert swept_quality == pytest.approx([naive_means(scores, quality, t) for t in thresholds])


def test_a_sweep_by_hand():
    # three rows, three exits; leaving costs 1, 2, 3
    scores = np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.0], [0.1, 0.2, 0.0]])
    costs = np.broadcast_to([1.0, 2.0, 3.0], (3, 3))
    # at .15: row 1 leaves at 1, row 2 at 1, row 3 at 2 -> 4/3;  at .5: 1, 2, 3 -> 2;  at .95: 3, 3, 3 -> 3
    assert sweep(scores, [costs], np.array([0.15, 0.5, 0.95]))[0] == pytest.approx([4 / 3, 2.0, 3.0])


def test_a_score_equal_to_the_threshold_leaves_in_the_sweep():
    scores, costs = np.array([[0.5, 0.0]]), np.array([[1.0, 2.0]])
    assert sweep(scores, [costs], np.array([0.5, np.nextafter(0.5, 1)]))[0].tolist() == [1.0, 2.0]


@given(seed=SEEDS, **SIZES, counts=st.booleans(), ties=st.booleans(), muted=st.sets(st.integers(0, 4)))
def test_the_curve_of_one_threshold_holds_every_outcome_there_is(seed, rows, exits, counts, ties, muted):
    scores, quality, cost = case(seed, rows, exits, counts, ties, muted)
    lowest = 1.0 if counts else 0.0
    curve = single_threshold_curve(scores, quality, cost, lowest, counts)
    early = scores[:, :-1]
    every = [t for t in np.unique(early[np.isfinite(early)]) if t >= lowest][::-1]
    assert len(curve.cost) == len(every) + 1
    assert curve.cost == pytest.approx([cost[-1], *(naive_means(scores, np.tile(cost, (rows, 1)), t) for t in every)])
    assert curve.quality == pytest.approx([quality[:, -1].mean(), *(naive_means(scores, quality, t) for t in every)])


@given(seed=SEEDS, **SIZES, counts=st.booleans(), ties=st.booleans(), muted=st.sets(st.integers(0, 4)))
def test_the_curves_own_thresholds_give_the_curves_numbers(seed, rows, exits, counts, ties, muted):
    scores, quality, cost = case(seed, rows, exits, counts, ties, muted)
    lowest = 1.0 if counts else 0.0
    rules = [LeaverRule(None, slack=slack) for slack in (0.0, 0.1, 0.5)]
    for curve in (
        single_threshold_curve(scores, quality, cost, lowest, counts),
        per_exit_curve(scores, quality, cost, rules, lowest, counts),
    ):
        index = np.arange(rows)
        for vector, mean_cost, mean_quality, error in zip(curve.thresholds[:], *curve[1:], strict=True):
            taken = np.array([naive_exit(row, vector) for row in scores])
            gain = quality[index, taken] - quality[:, -1]
            assert exits_taken(scores, vector).tolist() == taken.tolist()
            assert mean_cost == pytest.approx(cost[taken].mean())
            assert mean_quality == pytest.approx(quality[index, taken].mean())
            assert error == pytest.approx(gain.std() / np.sqrt(rows), abs=1e-9)
            assert not (vector < lowest).any()
            assert np.array_equal(vector[np.isfinite(vector)], vector[np.isfinite(vector)].astype(np.float32))


def test_muted_columns_get_no_threshold_and_take_no_row():
    scores, quality, cost = case(1, 20, 4, muted=(0, 2))
    curve = single_threshold_curve(scores, quality, cost, 0.0, False)
    assert np.isnan(curve.thresholds[:][:, [0, 2]]).all()
    assert np.isfinite(curve.thresholds[1:][:, 1]).all()
    assert set(exits_taken(scores, curve.thresholds[-1]).tolist()) == {1}


def test_with_every_exit_muted_the_curve_is_the_full_model():
    scores, quality, cost = case(1, 20, 3, muted=(0, 1))
    for curve in (
        single_threshold_curve(scores, quality, cost, 0.0, False),
        per_exit_curve(scores, quality, cost, [LeaverRule(None, slack=1.0)], 0.0, False),
    ):
        assert np.isnan(curve.thresholds[:]).all()
        assert curve.cost == pytest.approx([cost[-1]] * len(curve.cost))
        assert curve.quality == pytest.approx([quality[:, -1].mean()] * len(curve.cost))


@given(scores=st.lists(st.floats(0, 2, width=32), max_size=12), lowest=st.sampled_from([0.0, 0.5, 1.0]))
def test_candidates_tell_every_two_allowed_scores_apart(scores, lowest):
    cuts = candidates(np.array([*scores, -np.inf]), lowest, counts=False)
    allowed = sorted({score for score in scores if score >= lowest})
    assert len(cuts) == len(allowed)
    for cut, score, below in zip(cuts, allowed, [-1.0, *allowed], strict=False):
        assert max(below, lowest) <= cut <= score
        assert cut > below


def test_a_candidate_is_not_lost_when_halfway_is_below_the_lowest_threshold():
    # halfway between .2 and .6 is .4, below the lowest threshold .5; the score .6 must still be reachable alone
    cuts = candidates(np.array([0.2, 0.6]), 0.5, counts=False)
    assert cuts.tolist() == [0.5]


def test_candidates_of_counts_stay_whole():
    assert candidates(np.array([[0.0, 3.0], [1.0, -np.inf]]), 1.0, counts=True).tolist() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("lower", "upper"), [(0.25, 0.75), (0.0, float(np.nextafter(np.float32(0), np.float32(1)))), (0.1, 0.1 + 1e-12)]
)
def test_a_cut_is_above_the_lower_and_at_most_the_upper(lower, upper):
    assert lower < cut_between(lower, upper) <= upper
    assert cut_between(0.25, 0.75) == 0.5


def loop(scores, cost, quality, thresholds):
    rows, means = np.arange(len(scores)), []
    for threshold in thresholds:
        leave = scores >= threshold
        leave[:, -1] = True
        taken = leave.argmax(1)
        means.append((cost[taken].mean(), quality[rows, taken].mean()))
    return np.array(means)


def test_two_thousand_thresholds_cost_far_less_than_a_loop_over_them():
    scores, quality, cost = case(0, 10_000, 12)
    thresholds = np.sort(np.random.default_rng(1).random(2000))
    some = np.arange(0, 2000, 100)

    values = [np.broadcast_to(cost, scores.shape), quality]
    expected, looped = counted(loop, scores, cost, quality, thresholds[some])
    found, swept = counted(lambda *parts: sweep(parts[0], parts[1:3], parts[3]), scores, *values, thresholds)

    assert np.stack(found, 1)[some] == pytest.approx(np.stack(expected))
    looped *= len(thresholds) / len(some)
    assert looped / swept >= 20, f"the loop handled {looped:.0f} numbers, the sweep {swept}"


class Counted(np.ndarray):
    """Numbers that every operation of NumPy on them is counted for, with what is made of them."""

    handled = 0

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        return self._count(getattr(ufunc, method), inputs, options)

    def __array_function__(self, function, types, inputs, options):
        return self._count(function, inputs, options)

    @staticmethod
    def _count(function, inputs, options):
        plain = [np.asarray(part) if isinstance(part, Counted) else part for part in inputs]
        Counted.handled += sum(part.size for part in plain if isinstance(part, np.ndarray))
        if "out" in options:
            options = {**options, "out": tuple(np.asarray(part) for part in options["out"])}
        result = function(*plain, **options)
        return result.view(Counted) if isinstance(result, np.ndarray) else result


def counted(work, *arrays):
    """What `work` makes of the arrays, and how many numbers NumPy read for it."""
    Counted.handled = 0
    result = work(*(array.view(Counted) for array in arrays))
    return [np.asarray(part) for part in result], Counted.handled
