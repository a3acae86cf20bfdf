"""Layers are made ready once for a model, and again as soon as anything about them has changed."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import hf_earlyexit as ee
from hf_earlyexit.families import prepared as prepared_module
from hf_earlyexit.families.packed_bert import PackedBertLayer
from hf_earlyexit.families.prepared import prepared
from hf_earlyexit.policies import StaticPolicy
from hf_earlyexit.serving.batching import pad_batch

ROWS = [{"input_ids": [2, *range(5, 5 + length), 3]} for length in (1, 4, 9, 3)]


def other(linear):
    torch.manual_seed(9)
    return nn.Linear(linear.in_features, linear.out_features).eval()


def new_weight(model, layers):
    layers[1].output.dense.weight = other(layers[1].output.dense).weight


def in_place(model, layers):
    with torch.no_grad():
        layers[1].output.dense.weight.mul_(-1)


def new_data(model, layers):
    layers[1].output.dense.weight.data = other(layers[1].output.dense).weight.data


def new_map(model, layers):
    layers[1].intermediate.dense = other(layers[1].intermediate.dense)


def new_layer(model, layers):
    layers[1] = copy.deepcopy(layers[0])


def swapped(model, layers):
    layers[0], layers[2] = layers[2], layers[0]


def hooked(model, layers):
    layers[1].output.dense.register_forward_hook(lambda module, given, output: -output)


def watched(model, layers):
    layers[1].register_forward_hook(lambda module, given, output: -output)


def wrapped(model, layers):
    layers[1].output.dense.forward = lambda hidden: hidden[..., :32]


def other_eps(model, layers):
    layers[1].output.LayerNorm.eps = 10.0


def eager(model, layers):
    model.set_attn_implementation("eager")
    layers[1].attention.self.scaling *= 2


CHANGES = (
    new_weight,
    in_place,
    new_data,
    new_map,
    new_layer,
    swapped,
    hooked,
    watched,
    wrapped,
    other_eps,
    eager,
)


def answers(model):
    """By `predict` and by `forward`."""
    served = ee.predict(model, ROWS)
    with torch.inference_mode():
        called = model(**pad_batch(ROWS))
    assert torch.equal(called.exit_layer, served.exit_layer)
    assert (called.logits - served.logits).abs().max() < 1e-5
    return served


@pytest.fixture
def model(tiny_model, open_policy):
    model = tiny_model()
    model.set_exit_policy(StaticPolicy.at(3, 4))
    return model


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_noticed(model, change):
    before = answers(model)
    assert answers(model).logits.equal(before.logits)
    change(model, model.base_model.encoder.layer)
    after, fresh = answers(model), answers(copy.deepcopy(model))
    assert (after.logits - fresh.logits).abs().max() <= 1e-6
    assert torch.equal(after.exit_layer, fresh.exit_layer)
    assert (after.logits - before.logits).abs().max() > 1e-4


@pytest.mark.parametrize("change", [new_weight, hooked, watched], ids=lambda change: change.__name__)
def test_so_is_what_changes_about_parts_that_are_watched_already(model, change):
    for part in model.base_model.encoder.layer[1].modules():
        part.register_forward_hook(lambda module, given, output: None)
    test_whatever_changes_is_noticed(model, change)


def test_nothing_is_made_ready_twice(model, monkeypatch):
    made = []
    init = PackedBertLayer.__init__
    monkeypatch.setattr(PackedBertLayer, "__init__", lambda *given: (made.append(1), init(*given))[1])
    answers(model)
    assert len(made) == 4
    answers(model)
    model.set_exit_policy(StaticPolicy.at(1, 4))  # a setting of the config: to look again is right, and answers are new
    assert answers(model).exit_layer.tolist() == [2] * 4
    count = len(made)
    answers(model)
    assert len(made) == count <= 8
    again = copy.deepcopy(model)
    answers(again)
    assert len(made) == count + 4


def test_a_model_in_training_is_not_packed_and_afterwards_is(model):
    family, base = model.family, model.base_model
    assert prepared(family, base).packs
    assert not prepared(family, base, pack=False).packs
    model.train()
    assert not prepared(family, base).packs
    model.eval()
    assert prepared(family, base).packs


def test_what_is_known_keeps_no_model_alive(model):
    alone = copy.deepcopy(model)
    answers(alone)
    assert alone.base_model in prepared_module._KNOWN
    gone, base = weakref.ref(alone), weakref.ref(alone.base_model)
    del alone
    gc.collect()
    assert gone() is None
    assert base() is None
