"""Products in 8 bits: every token is rounded by its own largest value, in batches and in a row alone alike."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_earlyexit.onnx.quantize import LARGEST, quantize_graph

WIDTH, OUT = 24, 10
DRAW = np.random.default_rng(0)
WEIGHT = DRAW.normal(size=(WIDTH, OUT)).astype(np.float32)


def one_product(shape):
    """A graph of one product with a constant, as a walk holds them."""
    node = helper.make_node("MatMul", ["hidden", "weight"], ["product"])
    given = [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, shape)]
    told = [helper.make_tensor_value_info("product", TensorProto.FLOAT, [*shape[:-1], OUT])]
    graph = helper.make_graph([node], "walk", given, told, [numpy_helper.from_array(WEIGHT, "weight")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def computed(hidden, shape, **options):
    graph = quantize_graph(one_product(shape), **options)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"hidden": hidden})[0], [node.op_type for node in graph.graph.node]


def expected(hidden):
    """The rounded numbers' products, in float64."""
    size = np.maximum(np.abs(hidden).max(-1, keepdims=True), np.float32(1e-30))
    rounded = np.rint(hidden / (size * np.float32(1 / LARGEST))).astype(np.float64)
    step = np.abs(WEIGHT).max(0) / LARGEST
    return rounded @ np.rint(WEIGHT / step).astype(np.float64) * step * (size / LARGEST)


@pytest.fixture
def hidden():
    """Three rows of seven tokens: a large and a small one, one whose largest value is negative, and one of zeros."""
    hidden = DRAW.normal(size=(3, 7, WIDTH)).astype(np.float32)
    hidden[:, 1] *= 1e3
    hidden[:, 4] *= 1e-4
    hidden[:, 2] = -np.abs(hidden[:, 2])
    hidden[:, 3] = 0
    return hidden


def test_a_token_is_rounded_by_its_own_largest_value(hidden):
    found, _ = computed(hidden, ["batch", "length", WIDTH])
    size = np.abs(hidden).max(-1, keepdims=True) + (hidden == 0).all(-1, keepdims=True)
    np.testing.assert_allclose(found / size, expected(hidden) / size, atol=1e-5)
    assert np.abs(found - hidden @ WEIGHT).max() > 1e-3  # it is rounded
    assert not found[:, 3].any()


def test_a_row_alone_has_the_same_answer_to_the_bit_by_fewer_nodes(hidden):
    together, nodes = computed(hidden, ["batch", "length", WIDTH])
    for row in range(3):
        alone, fewer = computed(hidden[row : row + 1], [1, "length", WIDTH], one_row=True)
        np.testing.assert_array_equal(alone[0], together[row])
    assert len(fewer) == len(nodes) - 3
    flat, _ = computed(hidden[0], ["length", WIDTH], one_row=True)  # positions that DeBERTa looks up have no rows
    np.testing.assert_array_equal(flat, together[0])
