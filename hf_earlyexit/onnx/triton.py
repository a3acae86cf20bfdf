"""The layout that inference servers read: a folder of a model repository, with one graph whose rows stop each for itself."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper

from ..errors import UsageError
from .graphs import ANSWERS, all_nodes, inputs_of

FILE, CONFIG, LABELS = "1/model.onnx", "config.pbtxt", "labels.txt"  # in the model's folder; 1 is its version
MOST_ROWS, MOST_WAIT = 32, 2000  # of a batch; microseconds that its first row waits for company
MASK = "attention_mask"
ROW = "row_"  # before what is of one row
KINDS: dict[int, str] = {TensorProto.INT64: "TYPE_INT64", TensorProto.FLOAT: "TYPE_FP32"}


def batched(one_row: ModelProto, num_classes: int) -> ModelProto:
    """A graph for batches that runs `one_row` for each row and stops where that one stops.

    Texts are `[B, T]`, padded on the right; padding is cut off before a row is run, so it costs nothing.

    Args:
        one_row: from `graphs.staged`.
        num_classes: C.

    Returns:
        A graph with the same names: logits `[B, C]`, exit_layer `[B, 1]` and exit_score `[B, 1]`.
    """
    given = {name: (kind, ("batch", *sizes[1:])) for name, (kind, sizes) in inputs_of(one_row).items()}
    inputs = [helper.make_tensor_value_info(name, kind, sizes) for name, (kind, sizes) in given.items()]
    outputs = [
        helper.make_tensor_value_info(name, kind, ["batch", num_classes if name == "logits" else 1])
        for name, kind in ANSWERS.items()
    ]
    nodes = [
        helper.make_node("Shape", [next(iter(given))], ["turn_batch_size"], start=0, end=1),
        helper.make_node("Squeeze", ["turn_batch_size"], ["turn_rows"]),
        helper.make_node("Loop", ["turn_rows", ""], list(ANSWERS), "rows_in_turn", body=_body(one_row)),
    ]
    graph = helper.make_graph(nodes, "rows", inputs, outputs)
    return helper.make_model(graph, opset_imports=one_row.opset_import, ir_version=one_row.ir_version)


def _body(one_row: ModelProto) -> GraphProto:
    """What is done for one row: it is taken from the batch, cut behind its last token, and run."""
    inner = GraphProto()
    inner.CopyFrom(one_row.graph)
    names = [info.name for info in inner.input]
    shared = {*names, *ANSWERS}
    for node in all_nodes(inner):
        for used in (node.input, node.output):
            used[:] = [ROW + name if name in shared else name for name in used]
    constants = [helper.make_tensor("turn_first", TensorProto.INT64, [1], [0])]
    nodes = [helper.make_node("Identity", ["turn_go_on"], ["turn_goes_on"])]
    cut = MASK in names
    if cut:
        nodes += _end_of_row()
        constants += [
            helper.make_tensor("turn_one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("turn_one_place", TensorProto.INT64, [1, 1], [1]),  # a row without a token keeps a column
        ]
    for name in names:
        nodes.append(helper.make_node("Gather", [name, "turn_number"], [f"turn_{name}"], axis=0))
        if cut:
            nodes.append(helper.make_node("Slice", [f"turn_{name}", "turn_first", "turn_end"], [f"turn_{name}_cut"]))
        whole = f"turn_{name}_cut" if cut else f"turn_{name}"
        nodes.append(helper.make_node("Unsqueeze", [whole, "turn_first"], [ROW + name]))
    nodes += inner.node
    nodes.append(helper.make_node("Squeeze", [ROW + "logits", "turn_first"], ["turn_logits_of_row"]))
    outputs = [helper.make_tensor_value_info("turn_goes_on", TensorProto.BOOL, [])]
    outputs += [
        helper.make_tensor_value_info("turn_logits_of_row" if name == "logits" else ROW + name, kind, None)
        for name, kind in ANSWERS.items()
    ]
    inputs = [
        helper.make_tensor_value_info("turn_number", TensorProto.INT64, []),
        helper.make_tensor_value_info("turn_go_on", TensorProto.BOOL, []),
    ]
    return helper.make_graph(nodes, "row", inputs, outputs, [*inner.initializer, *constants])


def _end_of_row() -> list[onnx.NodeProto]:
    """Behind its last real token, at least 1."""
    return [
        helper.make_node("Gather", [MASK, "turn_number"], ["turn_mask_of_row"], axis=0),
        helper.make_node("NonZero", ["turn_mask_of_row"], ["turn_real"]),  # [1, tokens]
        helper.make_node("Cast", ["turn_real"], ["turn_real_places"], to=TensorProto.INT64),
        helper.make_node("Add", ["turn_real_places", "turn_one"], ["turn_places"]),
        helper.make_node("Concat", ["turn_one_place", "turn_places"], ["turn_all_places"], axis=1),
        helper.make_node("ReduceMax", ["turn_all_places"], ["turn_length_of_row"], keepdims=0),
        helper.make_node("Unsqueeze", ["turn_length_of_row", "turn_first"], ["turn_end"]),
    ]


def triton_files(one_row: bytes, config: Any, name: str, threads: int = 1) -> dict[str, bytes]:
    """The files of a model in a repository of Triton's form, by their paths in its folder.

    Args:
        one_row: the one-file form.
        config: the model's.
        name: of the model, which is that of its folder.
        threads: that one instance computes with.

    Raises:
        UsageError: for a name that such a server cannot have.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(
            f"The folder's name {name!r} becomes the model's; expected letters, digits, dots, dashes and underscores.",
            field="folder",
            value=name,
        )
    graph = batched(onnx.load_from_string(one_row), config.num_labels)
    onnx.checker.check_model(graph)
    labels = [str(config.id2label[number]).replace("\n", " ") for number in range(config.num_labels)]
    return {
        FILE: bytes(graph.SerializeToString()),
        CONFIG: _config(graph, name, threads).encode(),
        LABELS: ("\n".join(labels) + "\n").encode(),
    }


def _config(graph: ModelProto, name: str, threads: int) -> str:
    """`config.pbtxt`, which tells what the graph takes and gives without the batch's axis."""
    lines = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', f"max_batch_size: {MOST_ROWS}"]
    for part, infos in (("input", graph.graph.input), ("output", graph.graph.output)):
        tensors = [_tensor(info, {"label_filename": LABELS} if info.name == "logits" else {}) for info in infos]
        lines.append(f"{part} [\n" + ",\n".join(tensors) + "\n]")
    lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {MOST_WAIT} }}")
    lines.append("instance_group [ { kind: KIND_CPU count: 1 } ]")
    lines += [
        f'parameters {{ key: "{key}" value: {{ string_value: "{threads}" }} }}'
        for key in ("intra_op_thread_count", "inter_op_thread_count")
    ]
    return "\n".join(lines) + "\n"


def _tensor(info: onnx.ValueInfoProto, more: Mapping[str, str]) -> str:
    axes = info.type.tensor_type.shape.dim[1:]
    dims = ", ".join(str(axis.dim_value) if axis.HasField("dim_value") else "-1" for axis in axes)
    fields = [f"name: {json.dumps(info.name)}", f"data_type: {KINDS[info.type.tensor_type.elem_type]}", f"dims: [ {dims} ]"]
    fields += [f"{key}: {json.dumps(value)}" for key, value in more.items()]
    return "  { " + " ".join(fields) + " }"
