"""What every registered signal keeps: one number per row, whatever the company, finite and within its bounds."""

import pytest
import torch
from torch import nn

from hf_earlyexit.errors import PolicyError
from hf_earlyexit.modeling.gates import StateGate
from hf_earlyexit.signals import SIGNALS, ExitPoint, names_at, scalars_of
from hf_earlyexit.signals.similarity import cosine

ROWS, WIDTH, CLASSES = 32, 16, 3
EVERY = pytest.mark.parametrize("name", SIGNALS.names())


def point(rows=slice(None), scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=generator)
    pooled, before, after = (scale * torch.randn(ROWS, WIDTH, generator=generator) for _ in range(3))
    parts = (part[rows].to(dtype) for part in (logits, pooled, before, after))
    return ExitPoint(*parts, StateGate(WIDTH, CLASSES).to(dtype))


@EVERY
def test_one_number_per_row_within_its_bounds(name):
    lowest, highest = SIGNALS.get(name).bounds
    for scale in (0.0, 1.0, 1e4):
        for dtype in (torch.float32, torch.bfloat16):
            values = SIGNALS.get(name).of(point(scale=scale, dtype=dtype))
            assert values.shape == (ROWS,)
            assert values.is_floating_point()
            assert torch.isfinite(values).all()
            assert (lowest - 1e-6 <= values).all()
            assert (values <= highest + 1e-6).all()


@EVERY
def test_rows_do_not_see_each_other(name):
    whole = SIGNALS.get(name).of(point())
    assert len(whole.unique()) == ROWS
    alone = torch.cat([SIGNALS.get(name).of(point(slice(row, row + 1))) for row in range(ROWS)])
    assert torch.allclose(whole, alone, atol=1e-6)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(SIGNALS.get(name).of(point(order)), whole[order], atol=1e-6)
    assert SIGNALS.get(name).of(point(slice(0, 0))).shape == (0,)


@EVERY
def test_what_it_says_that_it_reads_is_all_that_it_reads(name):
    signal, full = SIGNALS.get(name), point()
    given = full._replace(
        logits=full.logits if signal.reads_logits else None,
        before=full.before if signal.reads_states else None,
        after=full.after if signal.reads_states else None,
        pooled=full.pooled if not signal.at_last else None,
        gate=full.gate if not signal.at_last else None,
    )
    assert torch.equal(signal.of(given), signal.of(full))


def test_what_is_missing_is_told_with_a_cure():
    bare = ExitPoint(torch.zeros(2, 3))
    with pytest.raises(PolicyError, match=r"reads gates \('gate'\), and there are none: load the model with exit_gate"):
        SIGNALS.get("gate").of(bare)
    with pytest.raises(PolicyError, match="reads cosines"):
        SIGNALS.get("similarity").of(bare)


def test_the_last_exit_gives_what_its_signals_say():
    assert names_at(("gate", "similarity"), last=True) == ("similarity",)
    assert names_at(("gate", "similarity"), last=False) == ("gate", "similarity")
    given = scalars_of(("similarity", "gate"), point())
    assert list(given) == ["similarity", "gate"]


def test_the_cosine_is_that_of_torch():
    at = point()
    assert torch.allclose(cosine(at.before, at.after), nn.functional.cosine_similarity(at.before, at.after), atol=1e-6)
