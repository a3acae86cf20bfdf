"""A row is answered to the bit alike, alone and in any company."""

import random

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.families.packed import Packed
from tests.families.tiny import PACKED, VOCABULARY, new_model

WIDE = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 64}


def make_rows(count, vocabulary):
    dice = random.Random(0)
    return [{"input_ids": [dice.randrange(5, vocabulary) for _ in range(dice.randrange(4, 9))]} for _ in range(count)]


@pytest.fixture(params=["linear-mean", "pooler", "linear"])
def served(request):
    """A model whose heads are wide enough for their products to be summed in several orders, and 60 rows."""
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(
        vocab_size=40, num_hidden_layers=3, num_labels=3, exit_head=request.param, exit_gate="linear", **WIDE
    )
    return ee.EarlyExitBertForSequenceClassification(config).eval(), make_rows(60, 40)


def answered(model, rows, size):
    """Logits of every exit `[N, E, C]`, of so many rows at once."""
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    options = [{"early_exit": False, "layer_budget": layer} for layer in model.exit_layers]
    exits = [torch.cat([ee.predict(model, part, **option).logits for part in parts]) for option in options]
    return torch.stack(exits, 1)


def test_a_row_is_alike_alone_in_pairs_and_in_a_crowd(served):
    model, rows = served
    crowd = answered(model, rows, len(rows))
    for size in (1, 2, 3, 5):
        assert torch.equal(answered(model, rows, size), crowd)


@pytest.mark.parametrize("name", PACKED)
def test_every_family_whose_rows_stand_end_to_end_keeps_it(name):
    """At widths that are multiples of 32, as real ones are: the last few of other numbers are computed one by one."""
    inner = {"distilbert": "hidden_dim", "gpt2": "n_inner"}.get(name, "intermediate_size")
    model, rows = new_model(name, **{inner: 64}), make_rows(30, VOCABULARY)
    crowd = answered(model, rows, len(rows))
    for size in (1, 3):
        assert torch.equal(answered(model, rows, size), crowd)


@pytest.mark.parametrize("rule", ["gate", "saturation"])
def test_rules_that_read_more_than_logits_keep_it(served, rule):
    model, rows = served
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(trace, rule, ee.LayerBudget(2), keep_weak_exits=True, folds=0))
    crowd = ee.predict(model, rows)
    alone = [ee.predict(model, [row]) for row in rows]
    assert torch.equal(torch.cat([one.exit_score for one in alone]), crowd.exit_score)
    assert torch.equal(torch.cat([one.exit_layer for one in alone]), crowd.exit_layer)


def test_no_product_of_a_head_has_fewer_rows(served):
    """Fewer are summed in another order; gates and the last exit are meant, too."""
    model, rows = served
    counts = []
    heads = [*model.exit_heads.values(), *model.exit_gates.values(), model.classifier, model.bert.pooler]
    linear = [part for head in heads for part in head.modules() if isinstance(part, torch.nn.Linear)]
    for part in linear:
        part.register_forward_hook(lambda _, given, output: counts.append(given[0].reshape(-1, given[0].shape[-1]).shape[0]))
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(trace, "gate", ee.LayerBudget(3), keep_weak_exits=True, folds=0))
    counts.clear()
    answers = [ee.predict(model, part) for part in (rows[:1], rows[1:3], rows[3:6])]
    assert [len(one.logits) for one in answers] == [1, 2, 3]
    assert len(counts) >= len(answers)
    assert min(counts) == Packed.least_rows == 4
