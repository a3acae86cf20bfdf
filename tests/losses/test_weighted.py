import math

import pytest
import torch

from hf_earlyexit.errors import TrainingError
from hf_earlyexit.losses import OBJECTIVES, WeightedObjective, task_loss
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL


def logits_of(*probabilities):
    return torch.tensor(probabilities).log()


# Two rows, two exits; the label's probability is .5 and .25 at exit 1, .8 and .5 at exit 2.
LOGITS = torch.stack([logits_of([0.5, 0.5], [0.75, 0.25]), logits_of([0.8, 0.2], [0.5, 0.5])], 1)  # [2, 2, 2]
LABELS = torch.tensor([0, 1])
FIRST = (math.log(2) + math.log(4)) / 2  # 1.0397
SECOND = (math.log(1.25) + math.log(2)) / 2  # .4581


def value(objective, logits=LOGITS, labels=LABELS, problem_type=SINGLE_LABEL, layers=(3, 9)):
    return objective(logits, labels, problem_type, layers)


def test_each_exits_loss_is_its_mean_cross_entropy():
    assert value(WeightedObjective()).per_exit.tolist() == pytest.approx([FIRST, SECOND], rel=1e-6)


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [("linear", 3 / 12, 9 / 12), ("uniform", 1 / 2, 1 / 2), ([2, 6], 1 / 4, 3 / 4), ((0.0, 0.5), 0.0, 1.0)],
)
def test_the_loss_is_the_weighted_mean_of_the_exits(weights, first, second):
    objective = WeightedObjective(weights=weights)
    assert objective.exit_weights((3, 9)).tolist() == pytest.approx([first, second])
    assert float(value(objective).loss) == pytest.approx(first * FIRST + second * SECOND, rel=1e-6)


def test_linear_weights_of_twelve_layers():
    # i / (1 + 2 + ... + 12) = i / 78
    weights = WeightedObjective().exit_weights(range(1, 13))
    assert weights.tolist() == pytest.approx([layer / 78 for layer in range(1, 13)])


def test_rows_with_label_minus_100_are_left_out():
    labels = torch.tensor([0, -100])
    assert value(WeightedObjective(), labels=labels).per_exit.tolist() == pytest.approx([math.log(2), math.log(1.25)])


def test_many_labels_are_a_mean_of_two_class_problems():
    # one row, labels yes and no; probabilities .8, .4 -> -(log .8 + log .6) / 2 = (.2231 + .5108) / 2 = .3670
    logits = torch.tensor([[[0.8, 0.4]]]).logit()
    expected = -(math.log(0.8) + math.log(0.6)) / 2
    for labels in (torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]])):
        assert float(value(WeightedObjective(), logits, labels, MULTI_LABEL, (12,)).loss) == pytest.approx(
            expected, rel=1e-5
        )


@pytest.mark.parametrize("labels", [torch.tensor([1.0, 3.0]), torch.tensor([[1.0], [3.0]])], ids=["flat", "column"])
def test_values_are_a_squared_error(labels):
    # exit 1: (1.5 - 1)^2 = .25, (1 - 3)^2 = 4 -> 2.125;   exit 2: 0, (2.5 - 3)^2 = .25 -> .125
    logits = torch.tensor([[[1.5], [1.0]], [[1.0], [2.5]]])
    assert value(WeightedObjective(), logits, labels, REGRESSION).per_exit.tolist() == pytest.approx([2.125, 0.125])


def test_a_vector_of_values_is_a_mean_over_its_outputs():
    logits, labels = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert float(task_loss(logits, labels, REGRESSION)) == pytest.approx((1 + 4) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_are_in_float32_and_finite_for_large_half_precision_logits(dtype):
    logits = torch.tensor([[[6e4, -6e4], [0.0, 0.0]]], dtype=dtype)
    found = value(WeightedObjective(), logits, torch.tensor([1]))
    assert found.loss.dtype == found.per_exit.dtype == torch.float32
    assert bool(torch.isfinite(found.per_exit).all())
    assert float(found.per_exit[0]) > 1e5


def test_every_exit_with_weight_gets_a_gradient():
    logits = LOGITS.clone().requires_grad_()
    value(WeightedObjective(weights=[1.0, 0.0]), logits).loss.backward()
    assert float(logits.grad[:, 0].abs().min()) > 0
    assert float(logits.grad[:, 1].abs().max()) == 0


@pytest.mark.parametrize(
    "weights", ["quadratic", "", [], [1.0, -0.1], [0.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]], ids=repr
)
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_weights_that_cannot_work_are_refused(name, weights):
    with pytest.raises(TrainingError, match="weights is") as caught:
        OBJECTIVES.get(name)(weights=weights)
    assert caught.value.field == "weights"


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_the_wrong_number_of_weights_is_refused(name):
    with pytest.raises(TrainingError, match="3 numbers for 2 exits") as caught:
        value(OBJECTIVES.get(name)(weights=[1.0, 2.0, 3.0]))
    assert caught.value.field == "weights"


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_an_option_that_is_none_is_refused(name):
    with pytest.raises(TypeError, match="wieghts"):
        OBJECTIVES.get(name)(wieghts="linear")


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_serves_every_problem_type(name, problem_type):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, 4, generator=generator)
    labels = {
        SINGLE_LABEL: torch.randint(4, (6,), generator=generator),
        MULTI_LABEL: torch.randint(2, (6, 4), generator=generator).float(),
        REGRESSION: torch.randn(6, 4, generator=generator),
    }[problem_type]
    objective = OBJECTIVES.get(name)()
    found = value(objective, logits, labels, problem_type, (1, 2, 4))
    assert found.per_exit.shape == (3,)
    assert bool((found.per_exit > 0).all())
    assert float(objective.exit_weights((1, 2, 4)).sum()) == pytest.approx(1.0)
    assert float(found.loss) == pytest.approx(float((objective.exit_weights((1, 2, 4)) * found.per_exit).sum()))


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_a_model_with_its_last_exit_only_trains_as_usual(name):
    found = value(OBJECTIVES.get(name)(), LOGITS[:, 1:], layers=(12,))
    assert float(found.loss) == pytest.approx(SECOND, rel=1e-6)
