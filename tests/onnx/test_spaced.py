"""One file of a policy whose exits stand every so many layers."""

import onnx
import pytest

import hf_earlyexit as ee
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.walk import walk_graph
from tests.samples import learned_trace


def branches(graph):
    """How often a graph branches, in all its depths."""
    within = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return sum(node.op_type == "If" for node in graph.node) + sum(map(branches, within))


@pytest.mark.parametrize("name", ["confidence", "beem-c", "beem-calibrated"])
def test_exits_that_are_left_out_are_not_in_the_file(tiny_model, name):
    """Nor are their heads: a rule that remembers does not hear of them."""
    model = tiny_model(num_hidden_layers=6)
    plain, trace = walk_graph(model), learned_trace(300, exits=6)
    counts = {}
    for every in (1, 2, 3):
        policy = ee.calibrate(trace, name, "max-drop:0.1", every=every, folds=0).policy
        data = one_file(plain, model.config, policy, False)
        graph = onnx.load_from_string(data).graph
        counts[every] = branches(graph), len(data)
    assert [count for count, _ in counts.values()] == [5, 2, 1]
    assert counts[1][1] > counts[2][1] > counts[3][1]
