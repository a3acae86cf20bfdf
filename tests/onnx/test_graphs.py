"""Pieces and branches of a graph, and what it takes to make them."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from hf_earlyexit.onnx import graphs

DEPTH, WIDTH = 6, 64


def whole_numbers(rng, rows):
    """Of -1, 0 and 1, so that sums of products have no rounding."""
    return rng.integers(-1, 2, (rows, WIDTH)).astype(np.float32)


@pytest.fixture
def whole():
    """A graph of products with a large matrix each, and what an exit may ask after each of them."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    weights += [numpy_helper.from_array(np.zeros(1, np.float32), "zero"), numpy_helper.from_array(np.array([1]), "all")]
    for layer in range(DEPTH):
        weights.append(numpy_helper.from_array(whole_numbers(rng, WIDTH), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"h{layer + 1}"]))
        nodes.append(helper.make_node("ReduceSum", [f"h{layer + 1}", "all"], [f"s{layer}"], keepdims=0))
        nodes.append(helper.make_node("Greater", [f"s{layer}", "zero"], [f"d{layer}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("h0", f"h{DEPTH}")]
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
    nested = numbers(graphs.staged(whole, graphs.inputs_of(whole), exits()))
    assert nested.keys() == expected.keys()
    assert all(np.array_equal(nested[name], values) for name, values in expected.items())
    state = dict.fromkeys(("h2", "h3"), (TensorProto.FLOAT, ("b", WIDTH)))
    (piece,) = numbers(graphs.subgraph(whole, {"h2": state["h2"]}, {"h3": state["h3"]})).items()
    assert piece[0] == "w2"
    assert np.array_equal(piece[1], expected["w2"])


def test_no_branch_holds_another(whole):
    """Runtimes copy what a branch holds: nested ones would take memory by the square of the depth."""
    found = graphs.staged(whole, graphs.inputs_of(whole), exits())
    inner = [attribute.g for node in found.graph.node for attribute in node.attribute if attribute.HasField("g")]
    assert len(inner) == 2 * (DEPTH - 1)
    assert not any(attribute.HasField("g") for part in inner for node in part.node for attribute in node.attribute)
    matrix = 4 * WIDTH * WIDTH
    assert all(part.ByteSize() < 1.5 * matrix for part in inner)
    assert DEPTH * matrix < found.ByteSize() < (DEPTH + 2) * matrix


def test_weights_are_put_in_place_when_all_else_stands(whole, monkeypatch):
    """A graph is copied into its node and that into the next graph, each time with all it holds."""
    sizes, make = [], helper.make_graph
    monkeypatch.setattr(helper, "make_graph", lambda *parts: sizes.append(sum(map(size, parts[0]))) or make(*parts))
    graphs.staged(whole, graphs.inputs_of(whole), exits())
    assert 0 < max(sizes) < 4 * WIDTH * WIDTH


def size(node):
    return node.ByteSize()


def test_what_is_behind_the_exit_is_never_run(whole):
    """Counted by the runtime: products of the rows that leave, and of no layer more."""
    graph = graphs.staged(whole, graphs.inputs_of(whole), exits())
    options = ort.SessionOptions()
    options.enable_profiling, options.graph_optimization_level = True, ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with TemporaryDirectory() as folder:
        options.profile_file_prefix = f"{folder}/profile"
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        rng, layers = np.random.default_rng(0), []
        for _ in range(40):
            state = whole_numbers(rng, 1)
            answer, layer, score = session.run(None, {"h0": state})
            layers.append(int(layer[0]))
            expected = state
            for number in range(layers[-1]):
                expected = expected @ numbers(whole)[f"w{number}"]
                assert (expected.sum() > 0) == (number + 1 == layers[-1]) or number + 1 == DEPTH
            assert np.array_equal(answer, expected)
            assert np.array_equal(score, [expected.sum()])
        events = json.loads(Path(session.end_profiling()).read_text())
    assert len(set(layers)) > 3
    ran = [event for event in events if event["name"].endswith("_kernel_time") and event["args"]["op_name"] == "MatMul"]
    assert len(ran) == sum(layers)
