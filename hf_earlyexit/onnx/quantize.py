"""Products with constant matrices in 8 bits, each token rounded by its own largest value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
ONE, MIDDLE, STEP, TINY, LAST_AXIS, FLAT = (f"int8.{name}" for name in ("one", "middle", "step", "tiny", "axis", "flat"))
LARGEST = 127


def quantize_graph(whole: ModelProto, one_row: bool = False) -> ModelProto:
    """A copy of a flat float32 graph whose products `[..., K] x [K, N]` with a constant are computed in 8 bits.

    Weights have one scale per output. Inputs have one per token, found as they come: the usual one per batch would let a
    row's logits depend on its company. Heads, pooler and attention stay in float32; the pooler and heads are `Gemm`.

    Args:
        whole: from `walk_graph`.
        one_row: for batches of one row alone; answers are the same, and each input is rounded by three nodes fewer.
    """
    small = ModelProto()
    small.CopyFrom(whole)
    graph = small.graph
    weights = {weight.name: weight for weight in graph.initializer}
    nodes: list[NodeProto] = []
    rounded: set[str] = set()
    replaced: set[str] = set()
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        source, name = node.input
        matrix = numpy_helper.to_array(weights[name])
        if source not in rounded:
            rounded.add(source)
            if not one_row:
                graph.initializer.append(numpy_helper.from_array(np.array([-1, matrix.shape[0]]), f"{source}.rows"))
            nodes += _round_tokens(source, one_row)
        if name not in replaced:
            replaced.add(name)
            graph.initializer.extend(_round_columns(matrix, name))
        product = f"{node.output[0]}.unit"
        inputs = [f"{source}.int8", f"{name}.int8", ONE, f"{name}.scale", MIDDLE, f"{name}.zero"]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [product], domain=CONTRIB))
        nodes.append(helper.make_node("Mul", [product, f"{source}.scale"], [node.output[0]]))
    kept = [weight for weight in graph.initializer if weight.name not in replaced]
    shared = {ONE: np.float32(1), MIDDLE: np.uint8(128), STEP: np.float32(1 / LARGEST), TINY: np.float32(1e-30),
              LAST_AXIS: np.array([-1]), FLAT: np.array([-1])}  # fmt: skip
    kept += [numpy_helper.from_array(np.asarray(value), name) for name, value in shared.items()]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    small.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return small


def _round_tokens(source: str, one_row: bool) -> Iterator[NodeProto]:
    """`source` `[..., K]` to 8 bits around 128, and the scale `[..., 1]` of every token; one row is `[1, T, K]`."""

    def node(operator: str, inputs: list[str], output: str, **attributes: Any) -> NodeProto:
        return helper.make_node(operator, inputs, [f"{source}.{output}"], **attributes)

    def named(*names: str) -> list[str]:
        return [f"{source}.{name}" for name in names]

    middle = helper.make_tensor("middle", TensorProto.UINT8, [1], [128])
    yield node("Abs", [source], "sizes")
    yield node("ReduceMax", [*named("sizes"), LAST_AXIS], "largest_size")
    yield node("Max", [*named("largest_size"), TINY], "largest")
    yield node("Mul", [*named("largest"), STEP], "scale")
    yield node("Reshape", [*named("scale"), FLAT], "scales")
    yield node("Shape", named("scales"), "count")
    yield node("ConstantOfShape", named("count"), "middles", value=middle)
    if one_row:  # scales are along one axis, which then has all tokens
        yield node("QuantizeLinear", [source, *named("scales", "middles")], "int8", axis=-2)
        return
    yield node("Reshape", [source, *named("rows")], "flat")
    yield node("QuantizeLinear", named("flat", "scales", "middles"), "rounded", axis=0)
    yield node("Shape", [source], "shape")
    yield node("Reshape", named("rounded", "shape"), "int8")


def _round_columns(matrix: np.ndarray, name: str) -> Iterator[onnx.TensorProto]:
    """`[K, N]` in 8 bits, and the scale and zero of every column."""
    scale = np.maximum(np.abs(matrix).max(0), 1e-30).astype(np.float32) / LARGEST
    yield numpy_helper.from_array(np.rint(matrix / scale).astype(np.int8), f"{name}.int8")
    yield numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")
    yield numpy_helper.from_array(np.zeros(matrix.shape[1], np.int8), f"{name}.zero")
