"""Rows end to end: the same numbers as padded rows through the stock layers, and only where nothing stands in the way."""

import pytest
import torch
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.families.packed import Packed
from hf_earlyexit.modeling.heads import HEADS
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.walking.loop import run_all, run_early

OPEN = ee.ConfidencePolicy(thresholds=[1.0] * 3)  # out of reach: every row runs in full


def padded_signals(model, batch):
    with torch.inference_mode():
        return model(**batch, early_exit=False).exit_logits


def packed_signals(model, rows):
    """Every exit's logits `[N, E, C]` of packed rows."""
    walker = ModelWalker(model)
    assert walker.packs
    with torch.inference_mode():
        hidden, context = walker.begin(rows)
        assert hidden.shape == (sum(len(row["input_ids"]) for row in rows), 32)
        found = []
        for layer in range(1, 5):
            hidden = walker.run_layer(layer, hidden, context)
            found.append(walker.exit_signal(layer - 1, hidden, context).logits)
    return torch.stack(found, 1)


def as_rows(batch):
    return [
        {"input_ids": ids[: int(mask.sum())].tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("head", HEADS.names())
def test_packed_rows_give_the_stock_layers_numbers_at_every_exit(tiny_model, random_batch, head):
    model, batch = tiny_model(exit_head=head), random_batch(30, seed=4)
    assert (packed_signals(model, as_rows(batch)) - padded_signals(model, batch)).abs().max() <= 1e-5


def test_rows_of_equal_length_are_equal_to_the_bit(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(20, padded=False)
    assert torch.equal(packed_signals(model, as_rows(batch)), padded_signals(model, batch))


@pytest.mark.parametrize("head", ["linear", "linear-mean"])
def test_masks_with_holes_are_kept(tiny_model, random_batch, head):
    model, batch = tiny_model(exit_head=head), random_batch(12, seed=6)
    batch["attention_mask"][3, 1], batch["attention_mask"][5], batch["attention_mask"][7, 0] = 0, 0, 0
    rows = [
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    expected = padded_signals(model, batch)
    model.set_exit_policy(OPEN)
    with torch.inference_mode():
        packed = model(**batch, early_exit=True).logits
    assert (packed - expected[:, -1]).abs().max() <= 1e-5
    assert (ee.predict(model, rows).logits - expected[:, -1]).abs().max() <= 1e-5


def test_segments_positions_and_embeddings_are_packed_too(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(9, seed=7)
    generator = torch.Generator().manual_seed(0)
    batch["token_type_ids"] = torch.randint(2, batch["input_ids"].shape, generator=generator)
    batch["position_ids"] = torch.arange(16).flip(0)[None]
    model.set_exit_policy(OPEN)
    for given in (batch, {**batch, "input_ids": None, "inputs_embeds": torch.randn(9, 16, 32, generator=generator)}):
        with torch.inference_mode():
            assert (model(**given).logits - model(**given, early_exit=False).logits).abs().max() <= 1e-5


def test_taking_and_joining_keep_every_row_as_it_is(tiny_model, random_batch):
    walker = ModelWalker(tiny_model())
    rows = as_rows(random_batch(10, seed=1))
    with torch.inference_mode():
        hidden, context = walker.begin(rows)
        order = [7, 2, 5]
        some, kept = context.take(hidden, order, torch.tensor(order))
        both, joined = walker.join([(some, kept), (hidden, context)])
    parts, original = both.split(joined.lengths), hidden.split(context.lengths)
    assert [torch.equal(part, original[row]) for part, row in zip(parts, order + list(range(10)), strict=True)] == [
        True
    ] * 13
    assert joined.starts.tolist() == [sum(joined.lengths[:row]) for row in range(13)]
    assert sum(rows * length for rows, length in joined.runs) == len(both)


def test_forward_packs_a_padded_batch_where_rows_may_leave(tiny_model, random_batch):
    model, batch, seen = tiny_model(), random_batch(20, seed=2), []
    for layer in model.bert.encoder.layer:
        layer.output.dense.register_forward_hook(lambda module, given, output: seen.append(given[0].shape[:-1].numel()))
    for thresholds, tokens in (([1.0] * 3, int(batch["attention_mask"].sum())), ([None] * 3, 20 * 16)):
        model.set_exit_policy(ee.ConfidencePolicy(thresholds=thresholds))
        with torch.inference_mode():
            model(**batch)
        assert seen == [tokens] * 4
        seen.clear()


def test_hooks_that_transformers_leaves_behind_do_not_keep_rows_padded(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(3)
    with torch.inference_mode():
        model(**batch, output_hidden_states=True, output_attentions=False)
    assert model.bert.encoder.layer[0]._forward_hooks
    assert ModelWalker(model).packs


def watched(model):
    model.bert.encoder.layer[2].register_forward_hook(lambda *_: None)


def wrapped(model):
    layer = model.bert.encoder.layer[1]
    layer.forward = layer.forward


def subclassed(model):
    class Other(type(model.bert.encoder.layer[0])):
        pass

    model.bert.encoder.layer[3].__class__ = Other


def eager(model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize("change", [watched, wrapped, subclassed, eager])
def test_layers_that_are_not_plain_go_the_stock_way(tiny_model, random_batch, change):
    model, batch = tiny_model(), random_batch(15, seed=3)
    rows, policy = as_rows(batch), ee.ConfidencePolicy(thresholds=[0.8] * 3)
    model.set_exit_policy(policy)
    packed = ee.predict(model, rows)
    change(model)
    assert not ModelWalker(model).packs
    stock = ee.predict(model, rows)
    assert (packed.logits - stock.logits).abs().max() <= 1e-5
    assert torch.equal(packed.exit_layer, stock.exit_layer)
    with torch.inference_mode():
        assert (model(**batch).logits - stock.logits).abs().max() <= 1e-5


def test_maps_put_in_place_of_linear_ones_are_used(tiny_model, random_batch):
    class Shifted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, values):
            return self.inner(values) + 0.5

    model, batch = tiny_model(), random_batch(10)
    layer = model.bert.encoder.layer[1]
    layer.attention.self.value, layer.output.LayerNorm = Shifted(layer.attention.self.value), Shifted(layer.output.LayerNorm)
    assert (packed_signals(model, as_rows(batch)) - padded_signals(model, batch)).abs().max() <= 1e-5


def test_custom_masks_and_training_are_not_packed(tiny_model, random_batch):
    model, batch = tiny_model(exit_head="linear-cls"), random_batch(6, padded=False)
    model.set_exit_policy(OPEN)
    batch["attention_mask"] = torch.ones(6, 1, 16, 16).tril().bool()
    with torch.inference_mode():
        assert torch.allclose(model(**batch).logits, model(**batch, early_exit=False).logits, atol=1e-5)
    assert not model.train().family.packs(model.bert)


def test_gradients_flow_through_packed_rows(tiny_model, random_batch):
    model, batch = tiny_model(), random_batch(5)
    hidden, context = model.family.begin_packed(model.bert, batch)
    assert isinstance(context, Packed)
    run_early(model, hidden, context, OPEN, 3).logits.sum().backward()
    packed = model.bert.encoder.layer[0].attention.self.query.weight.grad.clone()
    model.zero_grad()
    hidden, context = model.family.begin(model.bert, batch, {})
    run_all(model, hidden, context, 3)[0][:, -1].sum().backward()
    assert torch.allclose(packed, model.bert.encoder.layer[0].attention.self.query.weight.grad, atol=1e-4)
