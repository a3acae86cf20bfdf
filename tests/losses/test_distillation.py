import math

import pytest
import torch

from hf_earlyexit.errors import TrainingError
from hf_earlyexit.losses import DistillationObjective, WeightedObjective
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION, SINGLE_LABEL

# One row: the exit says (1/2, 1/2), the last exit (3/4, 1/4).
LOGITS = torch.tensor([[[0.5, 0.5], [0.75, 0.25]]]).log()  # [1, 2, 2]
LABEL = torch.tensor([0])
EXIT_TO_LAST = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # -.2027 + .3466 = .1438
LAST_TO_EXIT = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # .3041 - .1733 = .1308


def losses(objective, logits=LOGITS, labels=LABEL, problem_type=SINGLE_LABEL):
    return objective.exit_losses(logits, labels, problem_type)


@pytest.mark.parametrize(("direction", "expected"), [("exit-to-last", EXIT_TO_LAST), ("last-to-exit", LAST_TO_EXIT)])
def test_the_directions_by_hand(direction, expected):
    found = losses(DistillationObjective(direction=direction))
    assert found.tolist() == pytest.approx([math.log(2) + expected, math.log(4 / 3)], abs=1e-6)


def test_strength_multiplies_the_divergence_alone():
    found = losses(DistillationObjective(strength=3.0))
    assert found.tolist() == pytest.approx([math.log(2) + 3 * EXIT_TO_LAST, math.log(4 / 3)], abs=1e-6)


def test_without_strength_it_is_the_weighted_objective():
    plain, none = WeightedObjective(), DistillationObjective(strength=0.0)
    assert torch.equal(losses(none), losses(plain))


def test_temperature_softens_both_and_multiplies_by_its_square():
    # T = 2: the exit stays (1/2, 1/2); the last exit's odds 3 become sqrt(3): q = sqrt(3) / (1 + sqrt(3)) = .6340
    q = math.sqrt(3) / (1 + math.sqrt(3))
    soft = 0.5 * math.log(0.5 / q) + 0.5 * math.log(0.5 / (1 - q))  # .0370
    found = losses(DistillationObjective(temperature=2.0))
    assert float(found[0]) == pytest.approx(math.log(2) + 4 * soft, abs=1e-6)


def test_many_labels_diverge_label_by_label():
    # the exit says 1/2 of both labels, the last exit 3/4 of both: twice the two-class divergence
    logits = torch.tensor([[[0.5, 0.5], [0.75, 0.75]]]).logit()
    found = DistillationObjective().divergence(logits, logits[:, -1:], MULTI_LABEL)
    assert found.tolist() == pytest.approx([2 * EXIT_TO_LAST, 0.0], abs=1e-6)


def test_values_diverge_by_their_squared_distance():
    logits = torch.tensor([[[1.0], [3.0]], [[2.0], [2.5]]])
    found = DistillationObjective().divergence(logits, logits[:, -1:], REGRESSION)
    assert found.tolist() == pytest.approx([(4 + 0.25) / 2, 0.0])


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("direction", ["exit-to-last", "last-to-exit"])
def test_the_last_exit_does_not_diverge_from_itself_at_all(problem_type, direction):
    logits = 50 * torch.randn(9, 4, 3, generator=torch.Generator().manual_seed(0))
    apart = DistillationObjective(direction=direction, temperature=0.7).divergence(logits, logits[:, -1:], problem_type)
    assert float(apart[-1]) == 0.0
    assert bool((apart[:-1] > 0).all())
    assert bool(torch.isfinite(apart).all())


@pytest.mark.parametrize("problem_type", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
def test_no_gradient_of_the_divergence_flows_into_the_teacher(problem_type):
    logits = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 0, 1, 1]) if problem_type == SINGLE_LABEL else (logits[:, 0] > 0).float()
    grads = []
    for objective in (DistillationObjective(strength=5.0), WeightedObjective()):
        given = logits.clone().requires_grad_()
        losses(objective, given, labels, problem_type).sum().backward()
        grads.append(given.grad)
    distilled, plain = grads
    assert torch.equal(distilled[:, -1], plain[:, -1])
    assert not torch.allclose(distilled[:, :-1], plain[:, :-1])


def test_exits_move_towards_the_last_one():
    logits = torch.tensor([[[0.0, 2.0], [3.0, 0.0]]], requires_grad=True)
    DistillationObjective().divergence(logits, logits[:, -1:].detach(), SINGLE_LABEL).sum().backward()
    assert float(logits.grad[0, 0, 0]) < 0 < float(logits.grad[0, 0, 1])


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), "2", None, True], ids=repr)
def test_a_temperature_that_cannot_work_is_refused(bad):
    with pytest.raises(TrainingError, match="temperature") as caught:
        DistillationObjective(temperature=bad)
    assert caught.value.field == "temperature"
    assert repr(caught.value.value) == repr(bad)


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf"), "1", None], ids=repr)
def test_a_strength_that_cannot_work_is_refused_by_its_own_name(bad):
    with pytest.raises(TrainingError, match="strength") as caught:
        DistillationObjective(strength=bad)
    assert caught.value.field == "strength"


@pytest.mark.parametrize("bad", ["both", "", None])
def test_a_direction_that_is_none_is_refused_with_the_list(bad):
    with pytest.raises(TrainingError, match="exit-to-last, last-to-exit") as caught:
        DistillationObjective(direction=bad)
    assert caught.value.field == "direction"
