"""Cutting a flat graph into pieces, and folding it into one graph whose branches hold what only deep rows need."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper

from ..errors import UsageError

ANSWERS = {"logits": TensorProto.FLOAT, "exit_layer": TensorProto.INT64, "exit_score": TensorProto.FLOAT}
GONE = "gone"  # whether the row has left
Shapes = Mapping[str, tuple[int, tuple[int | str, ...]]]
LARGE = 1024  # bytes of a weight that is put in place at the end
LARGEST_FILE = 2**31 - 1  # bytes; ONNX's own limit


def serialized(graph: ModelProto, cure: str) -> bytes:
    """The bytes of a graph.

    Args:
        graph: whole.
        cure: what to do if it is too large, in words.

    Raises:
        UsageError: for more bytes than one file holds.
    """
    if (size := graph.ByteSize()) > LARGEST_FILE:
        raise UsageError(f"The model takes {size:,} bytes; one ONNX file holds {LARGEST_FILE:,}: {cure}.", field="forms")
    return bytes(graph.SerializeToString())


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


class _Stage(NamedTuple):
    """What is computed after one exit and up to the next.

    Attributes:
        nodes: in order.
        layer: of the exit where it ends.
        answer, score, leave: names of `[1, C]`, `[1]` and the decision `[1]`, `None` at the last exit.
        kept: names of its values that later stages use.
    """

    nodes: list[NodeProto]
    layer: int
    answer: str
    score: str
    leave: str | None
    kept: list[str]

    @property
    def ends(self) -> list[str]:
        return [name for name in (self.answer, self.score, self.leave) if name is not None]

    @property
    def mark(self) -> str:
        """Behind the names of what it answers; the last one's are the graph's own."""
        return "" if self.leave is None else f"@{self.layer}"

    def results(self, mark: str) -> list[str]:
        """Names of what it answers, and of whether the row is gone."""
        return [f"{name}{mark}" for name in (*ANSWERS, *(() if self.leave is None else (GONE,)))]


def staged(whole: ModelProto, inputs: Shapes, exits: Sequence[tuple[int, str, str, str | None]]) -> ModelProto:
    """One graph that stops at the first exit that says so.

    What lies between two exits is the branch of an `If`, run only for a row that has not left. The branches follow one
    another and do not hold one another: runtimes keep a copy of all that a branch holds, which made a graph of nested ones
    grow with the square of the depth. Each has weights of its own, as runtimes prepare weights for fast products only where
    the graph that uses them holds them.

    Args:
        whole: a flat graph.
        inputs: of the whole.
        exits: layer, and the names of answer `[1, C]`, score `[1]` and decision `[1]` (`None` at the last exit), in order.
    """
    stages, values = _stages(whole.graph, set(inputs), exits), _values(whole)
    first = stages[0]
    nodes = [*first.nodes, *_results(first, first.mark, {})]
    for before, stage in pairwise(stages):
        gone, go_on = _passed_by(before, stage, values), _gone_through(whole.graph, stage, values)
        outputs = [*stage.kept, *stage.results(stage.mark)]
        name = f"to_{stage.layer}"
        nodes.append(helper.make_node("If", [GONE + before.mark], outputs, name, then_branch=gone, else_branch=go_on))
    weights = _weights(whole.graph, first.nodes, first.ends)
    return _model(whole, helper.make_graph(nodes, "row", _infos(inputs), _answer_infos(""), weights))


def _stages(graph: GraphProto, known: set[str], exits: Sequence[tuple[int, str, str, str | None]]) -> list[_Stage]:
    """Every node in the stage of the first exit that needs it."""
    stages: list[_Stage] = []
    for layer, answer, score, leave in exits:
        stage = _Stage([], layer, answer, score, leave, [])
        stage.nodes.extend(_ancestors(graph, stage.ends, known))
        known.update(name for node in stage.nodes for name in node.output)
        stages.append(stage)
    later: set[str] = set()
    for stage in reversed(stages):
        stage.kept.extend(name for node in stage.nodes for name in node.output if name in later)
        later.update(stage.ends, *(node.input for node in stage.nodes))
    return stages


def _gone_through(graph: GraphProto, stage: _Stage, values: Mapping[str, TypeProto.Tensor]) -> GraphProto:
    """The branch of a row that goes on: the stage itself."""
    mark, weights = f"@{stage.layer}", _weights(graph, stage.nodes, stage.ends)
    new = {name: name + mark for name in (*(weight.name for weight in weights), *stage.kept)}
    for weight in weights:
        weight.name = new[weight.name]
    nodes = [*(_renamed(node, new) for node in stage.nodes), *_results(stage, f"{mark}:on", new)]
    infos = [_info(new[name], values[name]) for name in stage.kept]
    outputs = [*infos, *_result_infos(stage, f"{mark}:on")]
    return helper.make_graph(nodes, f"on_to_{stage.layer}", [], outputs, weights)


def _passed_by(before: _Stage, stage: _Stage, values: Mapping[str, TypeProto.Tensor]) -> GraphProto:
    """The branch of a row that is gone: the answers it had, and nothing where the stage would have left values."""
    mark = f"@{stage.layer}:gone"
    nodes = [_nothing(name + mark, values[name]) for name in stage.kept]
    for old, name in zip(before.results(before.mark), stage.results(mark), strict=False):
        nodes.append(helper.make_node("Identity", [old], [name]))
    infos = [_info(name + mark, values[name]) for name in stage.kept]
    return helper.make_graph(nodes, f"past_{stage.layer}", [], [*infos, *_result_infos(stage, mark)])


def _results(stage: _Stage, mark: str, new: Mapping[str, str]) -> list[NodeProto]:
    """Nodes that give what a stage answers the names it has outside."""
    logits, exit_layer, exit_score, *gone = stage.results(mark)
    value = helper.make_tensor("layer", TensorProto.INT64, [1], [stage.layer])
    named = [(stage.answer, logits), (stage.score, exit_score), *zip(filter(None, [stage.leave]), gone, strict=True)]
    nodes = [helper.make_node("Identity", [new.get(name, name)], [outside]) for name, outside in named]
    return [*nodes, helper.make_node("Constant", [], [exit_layer], value=value)]


def _result_infos(stage: _Stage, mark: str) -> list[onnx.ValueInfoProto]:
    gone = [] if stage.leave is None else [helper.make_tensor_value_info(GONE + mark, TensorProto.BOOL, [1])]
    return [*_answer_infos(mark), *gone]


def _nothing(name: str, like: TypeProto.Tensor) -> NodeProto:
    """A tensor that stands for another: of its type, and empty along the axes whose size is open."""
    sizes = [axis.dim_value for axis in like.shape.dim] if like.HasField("shape") else [0]
    value = helper.make_tensor("nothing", like.elem_type, sizes, [0] * math.prod(sizes))
    return helper.make_node("Constant", [], [name], value=value)


def _info(name: str, like: TypeProto.Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, like.elem_type, None)


def _values(whole: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Types of all values of a flat graph, and sizes where they are known."""
    standard = [node for node in whole.graph.node if not node.domain]
    others = [name for node in whole.graph.node if node.domain for name in node.output]  # products in 8 bits
    inputs = [*whole.graph.input, *(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in others)]
    graph = helper.make_graph(standard, "row", inputs, whole.graph.output, _weights(whole.graph, standard))
    found = onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=whole.opset_import)).graph
    return {info.name: info.type.tensor_type for info in (*found.value_info, *found.output)}


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
            copies[-1].name, copies[-1].data_type, copies[-1].dims[:] = weight.name, weight.data_type, weight.dims
            copies[-1].data_location = TensorProto.EXTERNAL
            copies[-1].external_data.add(key="location", value=weight.name)
    return copies


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
