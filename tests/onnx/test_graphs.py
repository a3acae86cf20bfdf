"""Pieces and branches of a graph, and what it takes to make them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_earlyexit.onnx import graphs

DEPTH, WIDTH = 6, 32


@pytest.fixture
def whole():
    """A graph of products with a large matrix each, and what an exit may ask after each of them."""
    rng, nodes, weights = np.random.default_rng(0), [], [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    for layer in range(DEPTH):
        weights.append(numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"h{layer + 1}"]))
        nodes.append(helper.make_node("ReduceSum", [f"h{layer + 1}"], [f"s{layer}"]))
        nodes.append(helper.make_node("Greater", [f"s{layer}", "zero"], [f"d{layer}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", WIDTH]) for name in ("h0", f"h{DEPTH}")]
    return helper.make_model(helper.make_graph(nodes, "whole", ends[:1], ends[1:], weights))


def exits():
    return [(i + 1, f"h{i + 1}", f"s{i}", f"d{i}" if i + 1 < DEPTH else None) for i in range(DEPTH)]


def numbers(model):
    """Every weight of a model by the name it has in the whole."""
    found = {}
    for graph in graphs._all_graphs(model.graph):
        found |= {weight.name.partition("@")[0]: numpy_helper.to_array(weight) for weight in graph.initializer}
    return found


def test_pieces_and_branches_hold_the_numbers_of_the_whole(whole):
    expected = numbers(whole)
    nested = numbers(graphs.nest(whole, graphs.inputs_of(whole), exits()))
    assert nested.keys() == expected.keys()
    assert all(np.array_equal(nested[name], values) for name, values in expected.items())
    state = dict.fromkeys(("h2", "h3"), (TensorProto.FLOAT, ("b", WIDTH)))
    (piece,) = numbers(graphs.subgraph(whole, {"h2": state["h2"]}, {"h3": state["h3"]})).items()
    assert piece[0] == "w2"
    assert np.array_equal(piece[1], expected["w2"])


def test_branches_are_put_into_one_another_without_their_weights(whole, monkeypatch):
    """Each is copied into the one around it: with its weights, time and memory would grow with the square of the depth."""
    sizes, make = [], helper.make_graph

    def weighed(nodes, *parts):
        sizes.append(sum(node.ByteSize() for node in nodes))
        return make(nodes, *parts)

    monkeypatch.setattr(helper, "make_graph", weighed)
    nested = graphs.nest(whole, graphs.inputs_of(whole), exits())
    matrix = 4 * WIDTH * WIDTH
    assert DEPTH * matrix < nested.ByteSize() < (DEPTH + 2) * matrix
    assert max(sizes) < matrix * 1.5
