"""Every form leaves where the torch model leaves, whatever the batches, and runs no layer after that; see test_laws.py."""

import json

import numpy as np
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import PolicyError
from hf_earlyexit.policies.confidence import MeasuredPolicy
from hf_earlyexit.problem_types import MULTI_LABEL
from hf_earlyexit.serving.batching import pad_batch
from tests.onnx.conftest import feeds

CASES = [
    ("single", "confidence"), ("single", "beem-c"), ("multi", "confidence"), ("multi", "beem-c"), ("regression", "patience"),
]  # fmt: skip


def random_rows(count, seed=0):
    """Rows of 1 to 64 tokens, the shortest and the longest among them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 64, *torch.randint(1, 40, (count - 2,), generator=generator).tolist()]

    def draw(low, high, length):
        return torch.randint(low, high, (length,), generator=generator).tolist()

    return [{"input_ids": draw(5, 100, length), "token_type_ids": draw(0, 2, length)} for length in lengths]


def in_torch(model, policy, rows):
    """Exit layers and logits, each row alone through `forward`."""
    model.set_exit_policy(policy)
    try:
        with torch.inference_mode():
            done = [model(**pad_batch([row])) for row in rows]
    finally:
        model.set_exit_policy(None)
    return torch.cat([output.exit_layer for output in done]), torch.cat([output.logits for output in done])


def in_layers(found, policy, rows, **options):
    found.onnx.set_exit_policy(policy)
    answers = ee.predict(found.onnx, rows, **options)
    return answers.exit_layer, answers.logits


def in_one_file(session, rows):
    done = [session.run(["exit_layer", "logits"], feeds(row)) for row in rows]
    layers, logits = zip(*done, strict=True)
    return torch.from_numpy(np.concatenate(layers)), torch.from_numpy(np.concatenate(logits))


def same(first, second):
    return torch.equal(first[0], second[0]) and torch.allclose(first[1], second[1], atol=2e-5)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_all_forms_decide_as_torch_does_whatever_the_batches(kind, name, traced, one_row_session, open_policy):
    found = traced(kind)
    policy, rows = open_policy(found.model, name), random_rows(40)
    truth = in_torch(found.model, policy, rows)
    assert len(set(truth[0].tolist())) > 1
    for tokens in (1, 100, 4096):
        assert same(in_layers(found, policy, rows, max_batch_tokens=tokens), truth)
    assert same(in_layers(found, policy, rows[::-1]), tuple(part.flip(0) for part in truth))
    assert same(in_one_file(one_row_session(found, policy), rows), truth)


def test_a_closed_and_a_muted_exit_stay_closed(traced, one_row_session, open_policy):
    found, rows = traced(), random_rows(40)
    opened = open_policy(found.model, "patience").with_thresholds((None, 1.0, None))
    policy = type(opened).from_dict(opened.to_dict() | {"muted": [0]})
    truth = in_torch(found.model, policy, rows)
    assert set(truth[0].tolist()) <= {2, 4}
    assert same(in_layers(found, policy, rows), truth)
    assert same(in_one_file(one_row_session(found, policy), rows), truth)


@pytest.mark.parametrize("name", ["patience", "beem-c"])
def test_a_rule_with_memory_hears_closed_exits_where_nobody_may_leave(name, traced, one_row_session, open_policy):
    found, rows = traced(), random_rows(40)
    opened = open_policy(found.model, name)
    policy = opened.with_thresholds((None, opened.thresholds[1], None))
    truth = in_torch(found.model, policy, rows)
    deaf = type(opened).from_dict(policy.to_dict() | {"muted": [0]})
    assert not torch.equal(truth[0], in_torch(found.model, deaf, rows)[0])  # what exit 1 says matters at exit 2
    assert same(in_layers(found, policy, rows), truth)
    assert same(in_one_file(one_row_session(found, policy), rows), truth)


def test_layers_after_the_exit_do_not_run(traced, one_row_session, tmp_path):
    """The runtime's own record of the operators it ran: one attention, hence one Softmax, a layer."""
    found, rows = traced(), random_rows(12)
    policy = ee.policies.EntropyPolicy(thresholds=(0.4, 0.5, 0.6))
    reported = in_torch(found.model, policy, rows)[0].tolist()
    assert len(set(reported)) > 2
    session = one_row_session(found, policy, enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    for row in rows:
        session.run(None, feeds(row))
    with open(session.end_profiling()) as file:
        events = json.load(file)
    ran = [event for event in events if event.get("cat") == "Node" and event["args"].get("op_name") == "Softmax"]
    assert len([event for event in ran if event["name"].endswith("_kernel_time")]) == sum(reported)


def test_layers_of_the_batched_form_do_not_run_either(traced, open_policy, monkeypatch):
    found, rows, counted = traced(), random_rows(40), []
    run_layer = type(found.onnx.walker).run_layer

    def counting(self, layer, hidden, context):
        counted.append(len(hidden))
        return run_layer(self, layer, hidden, context)

    monkeypatch.setattr(type(found.onnx.walker), "run_layer", counting)
    layers, _ = in_layers(found, open_policy(found.model, "confidence"), rows)
    assert sum(counted) == int(layers.sum()) < 4 * len(rows)
    counted.clear()
    monitor = ee.Monitor(found.onnx, shadow=1.0)
    watched = ee.predict(found.onnx, rows, monitor=monitor)
    assert torch.equal(watched.exit_layer, layers)
    assert sum(counted) == 4 * len(rows) == 4 * monitor.state.num_shadowed  # rows go on from their exits
    full = ee.predict(found.onnx, rows, early_exit=False).logits.argmax(1)
    assert monitor.state.num_different == int((watched.logits.argmax(1) != full).sum())
    counted.clear()
    batch = pad_batch(rows)
    bare, shadowed = found.onnx(**batch), found.onnx(**batch, shadowed=[5, 2])
    assert torch.equal(bare.logits, shadowed.logits)
    extra = 2 * 4 - int(bare.exit_layer[[5, 2]].sum())
    assert sum(counted) == 2 * int(bare.exit_layer.sum()) + extra
    full = found.onnx(**batch, early_exit=False, shadowed=[5, 2])
    assert torch.allclose(shadowed.full_logits, full.logits[[5, 2]], atol=1e-5)
    assert torch.equal(full.full_logits, full.logits[[5, 2]])
    assert bare.full_logits is None


def test_a_policy_that_looks_at_values_is_refused(traced, one_row_session):
    class Peeking(MeasuredPolicy):
        name = "peeking"

        def update(self, state, signal, exit_index):
            top = signal.logits.softmax(-1).amax(-1)
            return state, torch.ones_like(top) if float(top) > 0.5 else top, signal.logits

    found = traced()
    with pytest.raises(PolicyError, match="peeking policy cannot be exported"):
        one_row_session(found, Peeking(thresholds=(0.5, 0.5, 0.5)))


def test_int8_is_near_float32_and_not_the_same(traced):
    exact, small, batch = traced(), traced(int8=True), pad_batch(random_rows(40))
    first, second = (found.onnx(**batch, early_exit=False).exit_logits for found in (exact, small))
    gap = (first - second).abs()
    assert 1e-4 < float(gap.max()) < 0.2 * float(first.std())


def test_problem_types_keep_their_answers(traced):
    found, batch = traced("multi"), pad_batch(random_rows(10))
    with torch.inference_mode():
        truth = found.model(**batch, early_exit=False)
    told = found.onnx(**batch)
    assert found.config.resolved_problem_type == MULTI_LABEL
    assert torch.allclose(told.exit_logits, truth.exit_logits, atol=2e-5)
