"""Reliability by hand."""

import pytest
import torch

from hf_earlyexit.errors import DataError
from hf_earlyexit.metrics import reliability


def rows(*probabilities):
    """Logits of rows that give class 0 these probabilities."""
    return torch.tensor([[p, 1 - p] for p in probabilities], dtype=torch.float64).log()


def test_bins_and_gap_by_hand():
    # confidences .62 .68 .91 .99; right: yes no yes yes; bins .6-.7 and .9-1
    found = reliability(rows(0.62, 0.68, 0.91, 0.01), torch.tensor([0, 1, 0, 1]))
    assert found.confidence == pytest.approx((0.65, 0.95))
    assert found.accuracy == pytest.approx((0.5, 1.0))
    assert found.share == (0.5, 0.5)
    assert found.ece == pytest.approx(0.5 * 0.15 + 0.5 * 0.05)


def test_certainty_falls_into_the_last_bin():
    found = reliability(torch.tensor([[1e4, -1e4]]), torch.tensor([1]), num_bins=3)
    assert (found.confidence, found.accuracy, found.ece) == ((1.0,), (0.0,), 1.0)


def test_an_honest_exit_has_no_gap():
    generator = torch.Generator().manual_seed(0)
    chance = 0.5 + 0.5 * torch.rand(20000, generator=generator, dtype=torch.float64)
    wrong = (torch.rand(20000, generator=generator, dtype=torch.float64) > chance).long()
    assert reliability(torch.stack([chance, 1 - chance], 1).log(), wrong).ece < 0.02


@pytest.mark.parametrize(("count", "bins"), [(0, 10), (3, 0)])
def test_nothing_to_look_at_is_refused(count, bins):
    with pytest.raises(DataError, match="expected at least one"):
        reliability(torch.zeros(count, 2), torch.zeros(count, dtype=torch.long), bins)
