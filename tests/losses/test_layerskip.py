import pytest
import torch

from hf_earlyexit.errors import TrainingError
from hf_earlyexit.losses import OBJECTIVES, LayerSkipObjective
from hf_earlyexit.losses.noise import label_keys


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"layer_dropout": 1.5}, "layer_dropout"),
        ({"layer_dropout": -0.1}, "layer_dropout"),
        ({"exit_scale": 2}, "exit_scale"),
        ({"exit_scale": float("nan")}, "exit_scale"),
        ({"curriculum": "rotation"}, "curriculum"),
        ({"curriculum": None}, "curriculum"),
        ({"rotation": 0}, "rotation"),
        ({"rotation": 1.5}, "rotation"),
    ],
    ids=lambda value: str(value),
)
def test_numbers_that_cannot_work_are_refused(options, field):
    with pytest.raises(TrainingError) as caught:
        LayerSkipObjective(**options)
    assert caught.value.field == field


def test_the_last_exit_must_weigh_something():
    with pytest.raises(TrainingError, match="the last exit is taught at every step") as caught:
        LayerSkipObjective(weights=[1.0, 0.0]).exit_weights((2, 4))
    assert caught.value.field == "weights"


def test_it_alone_drops_layers_and_teaches_in_turns():
    assert [name for name in OBJECTIVES.names() if OBJECTIVES.get(name).writers_only] == ["layerskip"]
    for name in set(OBJECTIVES.names()) - {"layerskip"}:
        assert OBJECTIVES.get(name)().drop_chances(4) is None
        assert OBJECTIVES.get(name)().taught((2, 4), None) is None


def test_keys_of_labels_know_words_and_places_and_no_padding():
    labels = torch.tensor([[5, 6, 7, -100], [5, 6, 7, -100], [6, 5, 7, -100], [-100, 5, 6, 7], [5, 6, 7, 0]])
    keys = label_keys(labels)
    assert keys.unique().tolist() == sorted(set(keys.tolist()))
    assert keys[0] == keys[1]
    assert len({*keys.tolist()}) == 4
    assert torch.equal(label_keys(labels[:1, :3]), keys[:1])
