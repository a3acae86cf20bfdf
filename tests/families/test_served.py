"""Every family serves what calibration says, by every policy; rows do not see each other; closed, it is the stock model."""

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.serving.batching import pad_batch

from .calibrated import calibrated, same, served
from .tiny import IMAGES, PAD, batch_of, new_model, stock_of

every = pytest.mark.parametrize("name", FAMILIES)
OTHERS = 500


@pytest.mark.parametrize("rule", POLICIES.names())
@every
def test_served_is_calibrated_on_a_thousand_rows(name, rule):
    family = calibrated(name)
    expected = family.expected[rule]
    assert len(expected[0].unique()) > 1 or rule == "static"
    assert same(served(family.model, family.rows, rule), expected)


@every
def test_forward_and_full_batches_serve_the_same(name):
    family = calibrated(name)
    batch = torch.stack([row["pixel_values"] for row in family.rows]) if name in IMAGES else pad_batch(family.rows, PAD)
    batch = {"pixel_values": batch} if name in IMAGES else batch
    for rule in ("confidence", "beem-c"):
        with torch.inference_mode():
            output = family.model(**batch, operating_point=rule)
        assert same((output.exit_layer, output.logits), family.expected[rule])


@pytest.mark.parametrize("rule", ["confidence", "beem-c"])
@every
def test_rows_answer_alone_as_in_any_company(name, rule):
    family = calibrated(name)
    rows, expected = family.rows[:OTHERS], tuple(part[:OTHERS] for part in family.expected[rule])
    assert same(served(family.model, rows, rule, max_batch_tokens=1), expected)
    assert same(served(family.model, rows[::-1], rule), tuple(part.flip(0) for part in expected))


def test_rows_that_see_each_other_are_told(monkeypatch):
    """The mutants of the laws above: states mixed within a batch, and a rule that is a little off."""
    family = calibrated("bert")
    rows, expected = family.rows[:OTHERS], tuple(part[:OTHERS] for part in family.expected["beem-c"])
    policy = family.policies["beem-c"]
    moved = policy.with_thresholds(tuple(1.05 * level for level in policy.thresholds))
    family.model.set_operating_points({**family.policies, "moved": moved})
    assert not same(served(family.model, rows, "moved"), expected)
    head = type(family.model.exit_heads["1"])
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda self, state: forward(self, state + 0.1 * state.mean(0)))
    assert not same(served(family.model, rows, "beem-c", max_batch_tokens=1), served(family.model, rows, "beem-c"))


@every
def test_closed_exits_give_the_stock_models_answers_to_the_bit(name):
    model = new_model(name)
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[None] * (len(model.exit_layers) - 1)))
    stock = stock_of(model, name)
    for padding in ("right", "left", "none"):
        batch = batch_of(name, padding=padding)
        with torch.inference_mode():
            assert torch.equal(model(**batch).logits, stock(**batch).logits)
