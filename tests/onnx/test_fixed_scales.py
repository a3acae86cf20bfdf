"""Products in 8 bits by fixed scales: found on real tokens, a step for every channel, and nothing looked at when serving."""

import json

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.onnx import export, graphs
from hf_earlyexit.onnx.fixed_scales import batches_of, digest, find_roundings
from hf_earlyexit.onnx.manifest import MANIFEST
from hf_earlyexit.onnx.quantize import LARGEST, Rounding, quantize_graph
from hf_earlyexit.serving.reader import reader_for
from tests.onnx.conftest import feeds
from tests.onnx.test_decisions import random_rows

WIDTH, OUT = 24, 10
DRAW = np.random.default_rng(1)
WEIGHT, BIAS = DRAW.normal(size=(WIDTH, OUT)).astype(np.float32), DRAW.normal(size=OUT).astype(np.float32)


@pytest.fixture
def graph():
    """A product and the sum with its bias, both outputs, of rows with a mask that it does not read."""
    nodes = [
        helper.make_node("MatMul", ["hidden", "weight"], ["product"]),
        helper.make_node("Add", ["bias", "product"], ["sum"]),
    ]
    given = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["batch", "length", WIDTH])]
    given.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"]))
    outputs = [helper.make_tensor_value_info("sum", TensorProto.FLOAT, ["batch", "length", OUT])]
    weights = [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(BIAS, "bias")]
    whole = helper.make_graph(nodes, "walk", given, outputs, weights)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def hidden():
    """Three rows of seven tokens, with a channel that is far larger than the others and one that is always 0."""
    hidden = DRAW.normal(size=(3, 7, WIDTH)).astype(np.float32)
    hidden[..., 3] *= 100
    hidden[..., 5] = 0
    hidden[..., 7] = np.abs(hidden[..., 7])
    return hidden


def batch(hidden, real=None):
    mask = torch.ones(hidden.shape[:2], dtype=torch.long) if real is None else torch.tensor(real)
    return {"hidden": torch.from_numpy(hidden), "attention_mask": mask}


def computed(whole, hidden):
    session = ort.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"hidden": hidden, "attention_mask": np.ones(hidden.shape[:2], np.int64)}
    return session.run(None, given)[0], [node.op_type for node in whole.graph.node]


def test_numbers_are_those_of_the_formula_and_the_product_adds_its_bias(graph, hidden):
    (rounding,) = find_roundings(graph, [batch(hidden)]).values()
    found, nodes = computed(quantize_graph(graph, roundings={"hidden": rounding}), 3 * hidden)  # some do not fit
    units = np.clip(np.rint(3 * hidden / rounding.steps) + rounding.zero, 0, 255) - rounding.zero
    assert set(np.unique(units + rounding.zero)) >= {0, 255}
    weight = WEIGHT * rounding.steps[:, None]
    step = np.abs(weight).max(0) / LARGEST
    expected = units.astype(np.float64) @ np.rint(weight / step) * step + BIAS
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    assert nodes == ["Mul", "QuantizeLinear", "MatMulIntegerToFloat"]


def test_a_product_that_others_read_keeps_its_sum(graph, hidden):
    graph.graph.output.append(helper.make_tensor_value_info("product", TensorProto.FLOAT, ["batch", "length", OUT]))
    small = quantize_graph(graph, roundings=find_roundings(graph, [batch(hidden)]))
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    total, product = session.run(["sum", "product"], {"hidden": hidden, "attention_mask": np.ones((3, 7), np.int64)})
    np.testing.assert_allclose(total, product + BIAS, atol=1e-5)


def test_layers_that_share_a_weight_round_it_each_for_what_it_reads(graph, hidden):
    graph.graph.node.append(helper.make_node("Neg", ["hidden"], ["turned"]))
    graph.graph.node.append(helper.make_node("Mul", ["turned", "turned"], ["squared"]))
    graph.graph.node.append(helper.make_node("MatMul", ["squared", "weight"], ["second"]))
    graph.graph.output.append(helper.make_tensor_value_info("second", TensorProto.FLOAT, ["batch", "length", OUT]))
    small = quantize_graph(graph, roundings=find_roundings(graph, [batch(hidden)]))
    session = ort.InferenceSession(small.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"hidden": hidden, "attention_mask": np.ones((3, 7), np.int64)}
    for found, right in zip(
        session.run(["sum", "second"], given), (hidden @ WEIGHT + BIAS, hidden**2 @ WEIGHT), strict=True
    ):
        assert 0 < np.abs(found - right).mean() < 0.02 * np.abs(right).mean()


def test_values_that_were_seen_fit_and_one_large_channel_costs_the_others_little(graph, hidden):
    hidden[:1] *= 3
    (rounding,) = find_roundings(graph, [batch(hidden[:1]), batch(hidden[1:])]).values()
    units = hidden / rounding.steps + rounding.zero
    assert units.min() > -0.51
    assert units.max() < 255.51
    assert units.max() - units.min() > 253  # and the room is used
    right = hidden @ WEIGHT + BIAS
    found, _ = computed(quantize_graph(graph, roundings={"hidden": rounding}), hidden)
    low, high = hidden.min(), hidden.max()
    one_step = Rounding(np.full(WIDTH, (high - low) / 255, np.float32), round(-low / (high - low) * 255))
    plain, _ = computed(quantize_graph(graph, roundings={"hidden": one_step}), hidden)
    assert np.abs(found - right).mean() < 0.5 * np.abs(plain - right).mean()


def test_a_channel_that_was_still_can_speak(graph, hidden):
    (rounding,) = find_roundings(graph, [batch(hidden)]).values()
    size = np.abs(hidden).max((0, 1)).mean() / 4
    assert 0 < size / rounding.steps[5] + rounding.zero < 255
    assert 0 < -size / rounding.steps[5] + rounding.zero < 255


def test_padding_fixes_no_scale(graph, hidden):
    wide = np.concatenate([hidden, np.full((3, 2, WIDTH), 1e6, np.float32)], 1)
    padded = find_roundings(graph, [batch(wide, [[1] * 7 + [0] * 2] * 3)])
    assert digest(padded) == digest(find_roundings(graph, [batch(hidden)]))
    assert digest(padded) != digest(find_roundings(graph, [batch(wide)]))


def test_values_that_are_not_finite_are_refused(graph, hidden):
    hidden[1, 2, 3] = np.nan
    with pytest.raises(DataError, match="not finite on scale_rows"):
        find_roundings(graph, [batch(hidden)])


@pytest.fixture
def exported(traced, open_policy, monkeypatch, tmp_path):
    """`exported(**options)`: the model in 8 bits, and the folder."""
    found = traced()
    monkeypatch.setattr(export, "walk_graph", lambda model: found.plain)
    model = found.model
    model.set_exit_policy(open_policy(model, "confidence"))
    rows = random_rows(300, seed=3)
    labels = ee.predict(model, rows).logits.argmax(-1).tolist()

    def make(name="out", **options):
        changed = ee.export_onnx(
            model, tmp_path / name, int8=True, rows=rows, labels=labels, target=ee.LayerBudget(2.5), **options
        )
        return ee.OnnxClassifier.from_pretrained(tmp_path / name), tmp_path / name, changed

    return make


def test_an_export_by_fixed_scales_is_served_as_it_was_calibrated(exported, traced):
    scale_rows = random_rows(250, seed=5)
    model, folder, changed = exported(scale_rows=scale_rows)
    assert model.form == "onnx-int8-static"
    rows = random_rows(200, seed=6)
    answers, backwards = ee.predict(model, rows), ee.predict(model, rows[::-1])
    assert len(set(answers.exit_layer.tolist())) > 1
    assert answers.form == "onnx-int8-static"
    session = ort.InferenceSession(folder / "model.onnx")
    alone = [session.run(["exit_layer", "logits"], feeds(row)) for row in rows]
    assert [int(layer[0]) for layer, _ in alone] == answers.exit_layer.tolist() == backwards.exit_layer.tolist()[::-1]
    assert np.abs(np.concatenate([logits for _, logits in alone]) - answers.logits.numpy()).max() < 1e-5
    assert model.exit_policy == changed.result.policy
    by_token, _, _ = exported("by-token")
    others, _, _ = exported("others", scale_rows=scale_rows[:8])
    assert by_token.form == "onnx-int8"
    assert len({model.fingerprint, by_token.fingerprint, others.fingerprint}) == 3
    exact = ee.predict(traced().model, rows, early_exit=False).logits
    off, usual = ((ee.predict(one, rows, early_exit=False).logits - exact).abs().mean() for one in (model, by_token))
    assert 0 < off < 2 * usual
    with pytest.raises(UsageError, match="onnx-int8-static; expected one that `convert` made"):
        ee.keep_thresholds(traced().model, model)
    with pytest.raises(UsageError, match="fixed scales, which its export alone knows"):
        export.open_one_row(traced().model, model)
    assert ee.convert(model) is ee.convert(model, "onnx-int8-static") is model
    written = json.loads((folder / MANIFEST).read_text())
    assert written["static"] is True
    assert written["dtype"] == "int8"


def test_bad_rows_are_told_by_name(exported, traced):
    with pytest.raises(DataError, match="scale_rows holds no rows"):
        exported(scale_rows=[])
    with pytest.raises(DataError, match="Row 1"):
        exported(scale_rows=[{"input_ids": [5, 6]}, {"input_ids": [10**6]}])
    with pytest.raises(DataError, match="Row 0 has no real token"):
        exported(scale_rows=[{"input_ids": [5, 6], "attention_mask": [0, 0]}])
    with pytest.raises(UsageError, match="scale_rows are for int8"):
        ee.export_onnx(traced().model, "unused", scale_rows=[{"input_ids": [5]}])


def test_a_model_that_is_too_large_for_one_graph_is_refused(traced, monkeypatch):
    found = traced()
    monkeypatch.setattr(graphs, "LARGEST_FILE", 100)
    batches = batches_of(found.model, random_rows(3, seed=1), reader_for(found.model), None)
    with pytest.raises(UsageError, match="one ONNX file holds 100: leave scale_rows out"):
        find_roundings(found.plain, batches)
