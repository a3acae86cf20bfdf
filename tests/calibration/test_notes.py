"""What a calibration says beside its numbers: rare classes that pay for it."""

import pytest
import torch

from hf_earlyexit.calibration import MaxDrop, calibrate
from hf_earlyexit.problem_types import MULTI_LABEL
from hf_earlyexit.trace import ExitTrace
from tests.samples import learned_trace


def notes_on(result, word):
    return [note for note in result.notes if word in note]


def rare_trace(found):
    """Many rare labels of which exits 1 and 2 find this share, and the last one all."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(1000, 20, generator=generator) < 0.04).float()
    sure = 1 + 3 * torch.rand(1000, 3, 20, generator=generator)
    seen = torch.rand(1000, 3, 20, generator=generator) < torch.tensor([found, found, 1.0]).view(1, 3, 1)
    logits = torch.where((labels[:, None] > 0) & seen, sure, -sure)
    return ExitTrace(logits=logits, labels=labels, exit_layers=(1, 2, 3), problem_type=MULTI_LABEL)


@pytest.mark.parametrize(("found", "told"), [(0.4, True), (0.995, False)])
def test_rare_labels_that_pay_for_the_speed_are_told(found, told):
    result = calibrate(rare_trace(found), "confidence", MaxDrop(0.02), keep_weak_exits=True)
    assert result.full_quality - result.quality <= 0.02 + 1e-9
    assert result.layer_speed_up > 1.5
    notes = notes_on(result, "rare classes")
    assert bool(notes) is told
    assert not told or "micro F1 falls from 1.0000 to 0." in notes[0]


def test_a_rare_class_that_is_given_up_is_told():
    labels = torch.cat([torch.zeros(950), torch.ones(50)]).long()
    last = torch.eye(2)[labels] * 4
    always_zero = torch.tensor([[3.0, 0.0]]).expand(1000, 2)
    trace = ExitTrace(logits=torch.stack([always_zero, last], 1), labels=labels, exit_layers=(1, 2))
    result = calibrate(trace, "confidence", MaxDrop(0.05), metric="accuracy", keep_weak_exits=True)
    (note,) = notes_on(result, "rare classes")
    assert "macro F1 falls from 1.0000 to 0.4872, accuracy from 1.0000 to 0.9500" in note


def test_even_classes_need_no_such_word():
    assert not notes_on(calibrate(learned_trace(rows=600), "confidence", MaxDrop(0.05)), "rare classes")
