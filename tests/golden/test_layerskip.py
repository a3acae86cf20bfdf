"""LayerSkip's weights, chances and curricula, by hand."""

import math

import pytest
import torch

from hf_earlyexit.losses import LayerSkipObjective, Progress
from hf_earlyexit.problem_types import SINGLE_LABEL
from tests.losses.test_weighted import FIRST, LABELS, LOGITS, SECOND


def test_weights_are_sums_of_layers_and_the_last_weighs_more():
    # layers 0 to 3, s = .2: s * 0, s * (0 + 1), s * (0 + 1 + 2), 3 + s * (0 + 1 + 2); together 0 + .2 + .6 + 3.6 = 4.4
    assert LayerSkipObjective().exit_weights((1, 2, 3, 4)).tolist() == pytest.approx([0, 0.2 / 4.4, 0.6 / 4.4, 3.6 / 4.4])
    # after layers 1, 3 and 5 of 0 to 5, s = .5: .5 * 1, .5 * (1 + 2 + 3), 5 + .5 * (1 + 2 + 3 + 4); together .5 + 3 + 10
    weights = LayerSkipObjective(exit_scale=0.5).exit_weights((2, 4, 6))
    assert weights.tolist() == pytest.approx([0.5 / 13.5, 3 / 13.5, 10 / 13.5])
    assert LayerSkipObjective(exit_scale=0.0).exit_weights((1, 2, 3, 4)).tolist() == [0, 0, 0, 1]
    assert LayerSkipObjective(weights="uniform").exit_weights((2, 4)).tolist() == [0.5, 0.5]


def test_the_weights_of_what_is_taught_are_divided_by_their_sum():
    # of (1, 2, 3, 4) the second and the last: .2 / 3.8 and 3.6 / 3.8
    value = LayerSkipObjective()(LOGITS, LABELS, SINGLE_LABEL, (1, 2, 3, 4), taught=[1, 3])
    assert value.per_exit.tolist() == pytest.approx([FIRST, SECOND])
    assert float(value.loss) == pytest.approx((0.2 * FIRST + 3.6 * SECOND) / 3.8)


def test_chances_grow_with_depth_from_nothing_to_the_whole():
    # five layers, p = .2: .2 * (2^(l / 4) - 1)
    by_hand = [0, 0.2 * (2**0.25 - 1), 0.2 * (math.sqrt(2) - 1), 0.2 * (2**0.75 - 1), 0.2]
    assert LayerSkipObjective(layer_dropout=0.2).drop_chances(5).tolist() == pytest.approx(by_hand)
    assert LayerSkipObjective(layer_dropout=0.0).drop_chances(5) is None
    assert LayerSkipObjective().drop_chances(1).tolist() == [0]


@pytest.mark.parametrize(
    ("rotation", "step", "expected"),
    [
        (2, 0, [0, 2, 4, 5]),  # exits 0 to 4 are early: every second one
        (2, 1, [1, 3, 5]),
        (2, 2, [0, 2, 4, 5]),
        (3, 1, [1, 4, 5]),
        (3, 5, [2, 5]),
        (1, 7, [0, 1, 2, 3, 4, 5]),
        (40, 3, [3, 5]),  # more than there are: one at a step
        (40, 6, [1, 5]),
    ],
)
def test_the_rotational_curriculum(rotation, step, expected):
    objective = LayerSkipObjective(rotation=rotation)
    assert objective.taught((1, 2, 3, 4, 5, 6), Progress(step, 100)) == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [3]),  # four layers, 80 steps: one layer more every 80 / (2 * 4) = 10
        (9, [3]),
        (10, [2, 3]),
        (19, [2, 3]),
        (20, [1, 2, 3]),
        (30, [0, 1, 2, 3]),
        (79, [0, 1, 2, 3]),
    ],
)
def test_the_gradual_curriculum(step, expected):
    assert LayerSkipObjective(curriculum="gradual").taught((1, 2, 3, 4), Progress(step, 80)) == expected


def test_the_gradual_curriculum_counts_layers_where_not_all_have_an_exit():
    # exits after 1, 3 and 4 of four layers: a step of 10 for each layer below the last
    objective = LayerSkipObjective(curriculum="gradual")
    taught = [objective.taught((1, 3, 4), Progress(step, 80)) for step in (0, 10, 20, 29, 30)]
    assert taught == [[2], [1, 2], [1, 2], [1, 2], [0, 1, 2]]


def test_without_a_curriculum_and_without_early_exits_all_are_taught():
    assert LayerSkipObjective(curriculum="none").taught((1, 3, 4), Progress(0, 80)) == [0, 1, 2]
    for curriculum in ("rotational", "gradual", "none"):
        assert LayerSkipObjective(curriculum=curriculum).taught((4,), Progress(5, 80)) == [0]


def test_labels_teach_a_gradient_to_what_is_taught_alone():
    logits = LOGITS.clone().requires_grad_()
    LayerSkipObjective(exit_scale=0.0)(logits, LABELS, SINGLE_LABEL, (2, 4)).loss.backward()
    assert float(logits.grad[:, 0].abs().max()) == 0 < float(logits.grad[:, 1].abs().min())
    assert torch.isfinite(logits.grad).all()
