"""A row is answered to the bit alike, alone and in any company."""

import random

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.families.packed import Packed

WIDE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 64}


@pytest.fixture(scope="module", params=["linear-mean", "pooler", "linear"])
def served(request):
    """A model whose heads are wide enough for their products to be summed in several orders, and 60 rows."""
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(
        vocab_size=40, num_hidden_layers=3, num_labels=3, exit_head=request.param, exit_gate="linear", **WIDE
    )
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    dice = random.Random(0)
    rows = [{"input_ids": [dice.randrange(5, 40) for _ in range(dice.randrange(4, 9))]} for _ in range(60)]
    return model, rows


def answered(model, rows, size):
    """Logits of every exit `[N, E, C]`, of so many rows at once."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    exits = [
        torch.cat([ee.predict(model, part, early_exit=False, layer_budget=layer).logits for part in parts])
        for layer in (1, 2, 3)
    ]
    return torch.stack(exits, 1)


def test_a_row_is_alike_alone_in_pairs_and_in_a_crowd(served):
    model, rows = served
    crowd = answered(model, rows, len(rows))
    for size in (1, 2, 3, 5):
        assert torch.equal(answered(model, rows, size), crowd)


def test_heads_that_see_few_rows_give_others(served, monkeypatch):
    model, rows = served
    monkeypatch.setattr(Packed, "least_rows", 0)
    crowd, alone = answered(model, rows, len(rows)), answered(model, rows, 1)
    assert not torch.equal(alone, crowd)
    torch.testing.assert_close(alone, crowd)


@pytest.mark.parametrize("rule", ["gate", "saturation"])
def test_rules_that_read_more_than_logits_do_too(served, rule):
    model, rows = served
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(trace, rule, ee.LayerBudget(2), keep_weak_exits=True, folds=0))
    crowd = ee.predict(model, rows)
    alone = [ee.predict(model, [row]) for row in rows]
    assert torch.equal(torch.cat([one.exit_score for one in alone]), crowd.exit_score)
