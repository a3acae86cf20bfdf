"""Gates are part of the model: made from the config, saved, missed when lost, read by the gate policy."""

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, UnknownNameError
from hf_earlyexit.modeling.fingerprint import model_fingerprint
from hf_earlyexit.modeling.gates import GATES

KINDS = GATES.names()


def traced(model, batch):
    """A trace of a batch."""
    with torch.inference_mode():
        output = model(**batch, early_exit=False)
    labels = output.exit_logits[:, -1].argmax(-1)
    return ee.ExitTrace(logits=output.exit_logits, labels=labels, exit_layers=model.exit_layers, scalars=output.exit_scalars)


def mixed(trace):
    """A gate policy that lets some rows go at every exit."""
    policy = ee.policies.GatePolicy.from_trace(trace)
    return policy.with_thresholds(tuple(policy.scan(trace).scores[:, :-1].quantile(0.6, dim=0).tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_but_the_last_has_a_gate(tiny_model, random_batch, kind):
    model = tiny_model(exit_gate=kind, exit_layers=[1, 3, 4])
    assert list(model.exit_gates) == ["1", "3"]
    assert model(**random_batch(5), early_exit=False).exit_scalars["gate"].shape == (5, 2)


def test_the_papers_gate_is_a_small_network_on_the_pooled_state(tiny_model):
    gate = tiny_model(exit_gate="mlp").exit_gates["1"]
    assert [tuple(weight.shape) for weight in gate.parameters()] == [(32, 32), (32,), (1, 32), (1,)]
    state, logits = torch.randn(6, 32), torch.randn(6, 3)
    by_hand = gate.outer(torch.nn.functional.gelu(gate.inner(state)))[:, 0]
    assert torch.equal(gate(state, logits), by_hand)
    assert torch.equal(gate(state, 7 * logits), by_hand)


def test_a_gate_that_sees_logits_sends_no_gradient_into_the_head(tiny_model):
    gate = tiny_model(exit_gate="mlp+logits").exit_gates["1"]
    assert gate.inner.weight.shape == (32, 32 + 3)
    state, logits = torch.randn(6, 32, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    assert not torch.equal(gate(state, logits), gate(state, 2 * logits))
    gate(state, logits).sum().backward()
    assert state.grad is not None
    assert logits.grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gates_change_no_answer_and_models_without_them_have_none(tiny_model, random_batch, kind):
    plain, gated, batch = tiny_model(), tiny_model(exit_gate=kind), random_batch(6)
    missing = gated.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.startswith("exit_gates.") for name in missing.missing_keys)
    without, having = plain(**batch, early_exit=False), gated(**batch, early_exit=False)
    assert torch.equal(without.exit_logits, having.exit_logits)
    assert without.exit_scalars is None
    assert not any("gate" in name for name in plain.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_serving_leaves_where_the_trace_says(tiny_model, random_batch, kind):
    model, batch = tiny_model(exit_gate=kind), random_batch(40)
    trace = traced(model, batch)
    policy = mixed(trace)
    model.set_exit_policy(policy)
    output = model(**batch)
    assert output.exit_layer.tolist() == ee.replay(policy, trace).exit_layer.tolist()
    assert len(set(output.exit_layer.tolist())) == 4


def test_gates_are_not_computed_for_rules_that_do_not_read_them(tiny_model, random_batch, open_policy):
    model, calls = tiny_model(exit_gate="mlp"), []
    for gate in model.exit_gates.values():
        gate.register_forward_hook(lambda *_: calls.append(1))
    policy = open_policy(model, "confidence")
    calls.clear()
    model.set_exit_policy(policy)
    model(**random_batch(6))
    assert calls == []


def test_a_model_without_gates_refuses_the_gate_policy_at_set_up(tiny_model, tiny_config):
    with pytest.raises(
        EarlyExitConfigError, match=r"exit_gate is None; expected a kind of gate, linear or mlp or mlp\+logits"
    ):
        tiny_model().set_exit_policy(ee.policies.GatePolicy.half(4))
    with pytest.raises(EarlyExitConfigError, match="the gate policy reads them"):
        tiny_config(exit_policy=ee.policies.GatePolicy.half(4).to_dict())


def test_an_unknown_gate_is_refused_with_those_there_are(tiny_config):
    with pytest.raises(UnknownNameError, match=r"Unknown exit gate 'mpl'. Did you mean 'mlp'"):
        tiny_config(exit_gate="mpl")


def test_traces_hold_the_gates_in_the_order_of_the_rows(tiny_model, tokenizer, random_texts, tmp_path):
    model, texts = tiny_model(exit_gate="mlp"), random_texts(30)
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 2] * 10})
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, max_batch_tokens=64, progress=False)
    with torch.inference_mode():
        outputs = [model(**tokenizer([text], return_tensors="pt"), early_exit=False) for text in texts]
    alone = torch.cat([output.exit_scalars["gate"] for output in outputs])
    assert torch.allclose(trace.scalars["gate"], alone, atol=1e-5)
    trace.save(tmp_path / "trace.safetensors")
    assert torch.equal(ee.ExitTrace.load(tmp_path / "trace.safetensors").scalars["gate"], trace.scalars["gate"])
    model.set_exit_policy(mixed(trace))
    assert ee.explain(model, texts[0], tokenizer=tokenizer).exit_layer in (1, 2, 3, 4)


def test_gates_come_back_to_the_bit_and_belong_to_the_fingerprint(tiny_model, random_batch, tmp_path):
    model, batch = tiny_model(exit_gate="mlp"), random_batch(5)
    model.set_exit_policy(mixed(traced(model, random_batch(40))))
    model.save_pretrained(tmp_path)
    again = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path).eval()
    gates, before = (each(**batch, early_exit=False).exit_scalars["gate"] for each in (again, model))
    assert torch.equal(gates, before)
    assert again.exit_policy == model.exit_policy
    assert model_fingerprint(again) == model_fingerprint(model)
    with torch.no_grad():
        again.exit_gates["2"].outer.bias += 1
    assert model_fingerprint(again) != model_fingerprint(model)
    stock = BertForSequenceClassification.from_pretrained(tmp_path).eval()  # reads the folder all the same
    assert torch.equal(stock(**batch).logits, model(**batch, early_exit=False).logits)


def test_lost_gates_are_an_error_and_can_be_started_anew(tiny_model, tmp_path):
    tiny_model(exit_gate="mlp").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "exit_gates.2" not in k}, file, {"format": "pt"})
    load = ee.EarlyExitBertForSequenceClassification.from_pretrained
    with pytest.raises(CheckpointError, match=r"missing: exit_gates\.2\.inner\.bias") as caught:
        load(tmp_path)
    assert caught.value.field == "exit_gates.2.inner.bias"
    assert torch.isfinite(load(tmp_path, init_missing_exits=True).exit_gates["2"].inner.weight).all()


def test_gates_are_added_to_a_trained_model_with_exits(tiny_model, random_batch, tmp_path):
    model, batch = tiny_model(), random_batch(5)
    model.save_pretrained(tmp_path)
    load = ee.EarlyExitBertForSequenceClassification.from_pretrained
    with pytest.raises(CheckpointError, match=r"missing: exit_gates\.1"):
        load(tmp_path, exit_gate="mlp")
    gated = load(tmp_path, exit_gate="mlp", init_missing_exits=True).eval()
    output = gated(**batch, early_exit=False)
    assert torch.equal(output.exit_logits, model(**batch, early_exit=False).exit_logits)
    assert torch.isfinite(output.exit_scalars["gate"]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_each_exit_asks_its_own_gate_of_its_own_state(tiny_model, random_batch, kind):
    model, states = tiny_model(exit_gate=kind), []
    hooks = [head.register_forward_pre_hook(lambda _, given: states.append(given[0])) for head in model.exit_heads.values()]
    with torch.inference_mode():
        output = model(**random_batch(6), early_exit=False)
        for hook in hooks:
            hook.remove()
        alone = [
            gate(state, logits)
            for gate, state, logits in zip(model.exit_gates.values(), states, output.exit_logits.unbind(1), strict=False)
        ]
    assert torch.equal(output.exit_scalars["gate"], torch.stack(alone, 1))
    gates = output.exit_scalars["gate"]
    assert (gates[:, 1:] - gates[:, :1]).abs().min() > 1e-4
