import pytest
import torch

from hf_earlyexit.errors import TrainingError
from hf_earlyexit.losses import OBJECTIVES, TwoStageObjective, WeightedObjective
from hf_earlyexit.problem_types import SINGLE_LABEL

LAYERS = (2, 4, 6, 12)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3, 0]),
        ("linear", [2 / 12, 4 / 12, 6 / 12, 0]),
        ([1.0, 1.0, 2.0, 9.0], [1 / 4, 1 / 4, 2 / 4, 0]),
    ],
)
def test_the_last_exit_weighs_nothing_and_the_others_sum_to_one(weights, expected):
    assert TwoStageObjective(weights=weights).exit_weights(LAYERS).tolist() == pytest.approx(expected)


def test_the_plain_form_is_a_mean_over_early_exits_without_distillation():
    logits = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 1, 0, 1])
    found = TwoStageObjective()(logits, labels, SINGLE_LABEL, LAYERS)
    plain = WeightedObjective().exit_losses(logits, labels, SINGLE_LABEL)
    assert torch.equal(found.per_exit, plain)
    assert float(found.loss) == pytest.approx(float(plain[:3].mean()), rel=1e-6)


def test_the_last_exit_gets_no_gradient():
    logits = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    TwoStageObjective(strength=1.0)(logits, torch.tensor([0, 1, 1, 0, 1]), SINGLE_LABEL, LAYERS).loss.backward()
    assert float(logits.grad[:, -1].abs().max()) == 0
    assert float(logits.grad[:, :-1].abs().min()) > 0


def test_weights_for_the_last_exit_alone_are_refused():
    with pytest.raises(TrainingError) as caught:
        TwoStageObjective(weights=[0.0, 0.0, 0.0, 1.0]).exit_weights(LAYERS)
    assert caught.value.field == "weights"


def test_it_alone_freezes_the_backbone():
    assert [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).freezes_backbone] == ["two-stage"]
