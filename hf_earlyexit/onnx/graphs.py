"""Cutting a flat graph into pieces, and folding it into one graph whose branches hold what only deep rows need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

ANSWERS = {"logits": TensorProto.FLOAT, "exit_layer": TensorProto.INT64, "exit_score": TensorProto.FLOAT}
Shapes = Mapping[str, tuple[int, tuple[int | str, ...]]]
LARGE = 1024  # bytes of a weight that is put in place at the end


def subgraph(whole: ModelProto, inputs: Shapes, outputs: Shapes) -> ModelProto:
    """The part of a flat graph between some of its values.

    Args:
        whole: a graph whose inputs are all of one shape: `[B, T]`, or pictures of one size.
        inputs: values to start from, with their element types and shapes; the first axes of one of them are `[B, T]`.
        outputs: values to end with.
    """
    begins = {info.name for info in whole.graph.input}
    nodes = _ancestors(whole.graph, outputs, set(inputs))
    shaped = next(name for name, (_, shape) in inputs.items() if len(shape) > 1)
    kept = []
    for node in nodes:
        if node.op_type == "Shape" and node.input[0] in begins and node.input[0] not in inputs:
            node = _renamed(node, {node.input[0]: shaped})  # only its axes of open size are ever asked for
        kept.append(node)
    graph = helper.make_graph(kept, "part", _infos(inputs), _infos(outputs), _weights(whole.graph, kept))
    return _model(whole, graph)


def inputs_of(whole: ModelProto) -> dict[str, tuple[int, tuple[int | str, ...]]]:
    """The inputs of a whole, as `subgraph` takes them; open sizes by their names, such as "batch"."""
    return {info.name: (info.type.tensor_type.elem_type, _sizes(info)) for info in whole.graph.input}


def sizes_of(whole: ModelProto, output: str) -> tuple[int | str, ...]:
    """The sizes of one of its outputs."""
    return next(_sizes(info) for info in whole.graph.output if info.name == output)


def _sizes(info: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(axis.dim_param or axis.dim_value for axis in info.type.tensor_type.shape.dim)


def nest(whole: ModelProto, inputs: Shapes, exits: Sequence[tuple[int, str, str, str | None]]) -> ModelProto:
    """One graph that stops at the first exit that says so.

    Every node stands in the branch of the first exit that needs it, with its own weights: runtimes prepare weights for fast
    products only where the graph that uses them holds them.

    Args:
        whole: a flat graph.
        inputs: of the whole.
        exits: layer, and the names of answer `[1, C]`, score `[1]` and decision `[1]` (`None` at the last exit), in order.
    """
    placed: set[str] = set(inputs)
    stages = []
    for layer, answer, score, leave in exits:
        nodes = _ancestors(whole.graph, [name for name in (answer, score, leave) if name is not None], placed)
        placed.update(name for node in nodes for name in node.output)
        stages.append((nodes, layer, answer, score, leave))
    inner: GraphProto | None = None
    for number, (nodes, layer, answer, score, leave) in reversed(list(enumerate(stages))):
        ends = [name for name in (answer, score, leave) if name is not None]  # a constant has no node
        weights = _weights(whole.graph, nodes, ends)
        renamed = {weight.name: f"{weight.name}@{layer}" for weight in weights}
        for weight in weights:
            weight.name = renamed[weight.name]
        nodes = [_renamed(node, renamed) for node in nodes]
        outputs, more = _answers(
            layer,
            renamed.get(answer, answer),
            renamed.get(score, score),
            "" if number == 0 and inner is None else f"@{layer}",
        )
        if inner is None:
            nodes += more
        else:
            then = helper.make_graph(more, f"leave_{layer}", [], outputs)
            outputs = _answer_infos("" if number == 0 else f">{layer}")
            names = [info.name for info in outputs]
            condition = renamed.get(leave or "", leave or "")
            nodes.append(helper.make_node("If", [condition], names, f"exit_{layer}", then_branch=then, else_branch=inner))
        inner = helper.make_graph(nodes, f"to_{layer}", [] if number else _infos(inputs), outputs, weights)
    assert inner is not None
    return _model(whole, inner)


def append(whole: ModelProto, other: ModelProto, prefix: str) -> ModelProto:
    """`whole` with the nodes of `other`, whose inputs are values of `whole`; all else in `other` is prefixed."""
    joined = ModelProto()
    joined.CopyFrom(whole)
    shared = {info.name for info in other.graph.input}
    names = {name for node in other.graph.node for name in (*node.input, *node.output) if name} - shared
    names |= {weight.name for weight in other.graph.initializer}
    new = {name: prefix + name for name in names}
    joined.graph.node.extend(_renamed(node, new) for node in other.graph.node)
    for weight in other.graph.initializer:
        copy = joined.graph.initializer.add()
        copy.CopyFrom(weight)
        copy.name = new[weight.name]
    return joined


def all_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of all its branches."""
    for part in _all_graphs(graph):
        yield from part.node


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _all_graphs(attribute.g)


def _ancestors(graph: GraphProto, wanted: Iterable[str], known: set[str]) -> list[NodeProto]:
    """Nodes that make the wanted values from known ones, in order."""
    needed, nodes = set(wanted) - known, []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            nodes.append(node)
            needed.update(name for name in node.input if name and name not in known)
    return nodes[::-1]


def _weights(graph: GraphProto, nodes: Sequence[NodeProto], ends: Iterable[str] = ()) -> list[TensorProto]:
    """Copies of the constants that these nodes read, or that are wanted themselves.

    Large ones come without their numbers, until `_model` puts them in place: each branch is copied into the one around it.
    """
    used = {name for node in nodes for name in node.input} | set(ends)
    copies = []
    for weight in graph.initializer:
        if weight.name in used:
            copies.append(TensorProto())
            if len(weight.raw_data) < LARGE:
                copies[-1].CopyFrom(weight)
                continue
            copies[-1].name, copies[-1].data_location = weight.name, TensorProto.EXTERNAL
            copies[-1].external_data.add(key="location", value=weight.name)
    return copies


def _answers(layer: int, answer: str, score: str, mark: str) -> tuple[list[onnx.ValueInfoProto], list[NodeProto]]:
    infos = _answer_infos(mark)
    logits, exit_layer, exit_score = (info.name for info in infos)
    value = helper.make_tensor("layer", TensorProto.INT64, [1], [layer])
    return infos, [
        helper.make_node("Identity", [answer], [logits]),
        helper.make_node("Constant", [], [exit_layer], value=value),
        helper.make_node("Identity", [score], [exit_score]),
    ]


def _answer_infos(mark: str) -> list[onnx.ValueInfoProto]:
    shapes: dict[str, list[int | str | None]] = {"logits": [1, "classes"], "exit_layer": [1], "exit_score": [1]}
    return [helper.make_tensor_value_info(name + mark, kind, shapes[name]) for name, kind in ANSWERS.items()]


def _infos(values: Shapes) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, kind, list(shape)) for name, (kind, shape) in values.items()]


def _renamed(node: NodeProto, new: Mapping[str, str]) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [new.get(name, name) for name in node.input]
    copy.output[:] = [new.get(name, name) for name in node.output]
    copy.name = ""  # names of nodes would have to be unique, too
    return copy


def _model(whole: ModelProto, graph: GraphProto) -> ModelProto:
    """A model of parts of a whole, with the numbers of its weights."""
    model = helper.make_model(
        graph, opset_imports=list(whole.opset_import), ir_version=whole.ir_version, producer_name="hf_earlyexit"
    )
    weights = {weight.name: weight for weight in whole.graph.initializer}
    for part in _all_graphs(model.graph):
        for weight in part.initializer:
            if weight.data_location == TensorProto.EXTERNAL:
                name = weight.name
                weight.CopyFrom(weights[weight.external_data[0].value])
                weight.name = name
    return model
