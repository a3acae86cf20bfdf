"""Products with constant matrices in 8 bits: each token rounded by its own largest value, or by fixed scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

CONTRIB = "com.microsoft"
ONE, MIDDLE, STEP, TINY, LAST_AXIS, FLAT = (f"int8.{name}" for name in ("one", "middle", "step", "tiny", "axis", "flat"))
LARGEST = 127


class Rounding(NamedTuple):
    """How the values that a product reads are rounded where scales are fixed: to `value / step + zero`.

    Attributes:
        steps: of every channel `[K]`, float32, above 0.
        zero: what stands for 0, from 0 to 255.
    """

    steps: np.ndarray
    zero: int


def quantize_graph(whole: ModelProto, one_row: bool = False, roundings: Mapping[str, Rounding] | None = None) -> ModelProto:
    """A copy of a flat float32 graph whose products `[..., K] x [K, N]` with a constant are computed in 8 bits.

    Weights have one scale per output. Inputs have one per token, found as they come: the usual one per batch would let a
    row's logits depend on its company. Or they have fixed ones, which takes fewer nodes. Heads, pooler and attention stay in
    float32; the pooler and heads are `Gemm`.

    Args:
        whole: from `walk_graph`.
        one_row: for batches of one row alone; answers are the same, and each input is rounded by three nodes fewer, where
            scales are not fixed.
        roundings: fixed ones by the name of what a product reads, from `find_roundings`.
    """
    small = ModelProto()
    small.CopyFrom(whole)
    parts = _Parts({weight.name: weight for weight in whole.graph.initializer})
    if roundings is None:
        _by_token(whole.graph, parts, one_row)
    else:
        _by_channel(whole.graph, parts, roundings)
    graph = small.graph
    kept = [weight for weight in whole.graph.initializer if weight.name not in parts.replaced]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(parts.nodes)
    graph.initializer.extend([*kept, *parts.made.values()])
    small.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return small


def products(graph: GraphProto) -> list[tuple[NodeProto, TensorProto]]:
    """The products with a constant `[K, N]`, and that constant."""
    weights = {weight.name: weight for weight in graph.initializer}
    return [(node, weights[node.input[1]]) for node in graph.node if _is_product(node, weights)]


def _is_product(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    return node.op_type == "MatMul" and node.input[1] in weights


class _Parts:
    """The nodes of a graph in 8 bits, as they are made.

    Args:
        weights: of the float32 graph, by name.
    """

    def __init__(self, weights: Mapping[str, TensorProto]) -> None:
        self.weights, self.nodes = weights, list[NodeProto]()
        self.replaced: set[str] = set()  # names of weights
        self.made: dict[str, TensorProto] = {}
        self.constant(ONE, np.float32(1))

    def constant(self, name: str, value: Any) -> None:
        self.made[name] = numpy_helper.from_array(np.asarray(value), name)

    def product(self, source: str, weight: str, zero: str, output: str, steps: Any = None, bias: str | None = None) -> None:
        """A product of rounded values; `steps` `[K, 1]` are those of its input, where they are fixed."""
        name = weight if steps is None else f"{weight}:{source}"  # layers may share a weight
        if f"{name}.int8" not in self.made:
            self.replaced.add(weight)
            matrix = numpy_helper.to_array(self.weights[weight])
            self.made |= {part.name: part for part in _round_columns(matrix if steps is None else matrix * steps, name)}
        inputs = [f"{source}.int8", f"{name}.int8", ONE, f"{name}.scale", zero, f"{name}.zero"]
        inputs += [] if bias is None else [bias]
        self.nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], domain=CONTRIB))


def _by_token(graph: GraphProto, parts: _Parts, one_row: bool) -> None:
    """Every token is rounded by its own largest value."""
    parts.constant(MIDDLE, np.uint8(128))
    parts.constant(STEP, np.float32(1 / LARGEST))
    parts.constant(TINY, np.float32(1e-30))
    for name in (LAST_AXIS, FLAT):
        parts.constant(name, np.array([-1]))
    rounded: set[str] = set()
    for node in graph.node:
        if not _is_product(node, parts.weights):
            parts.nodes.append(node)
            continue
        source, weight = node.input
        if source not in rounded:
            rounded.add(source)
            if not one_row:
                parts.constant(f"{source}.rows", np.array([-1, parts.weights[weight].dims[0]]))
            parts.nodes += _round_tokens(source, one_row)
        product = f"{node.output[0]}.unit"
        parts.product(source, weight, MIDDLE, product)
        parts.nodes.append(helper.make_node("Mul", [product, f"{source}.scale"], [node.output[0]]))


def _by_channel(graph: GraphProto, parts: _Parts, roundings: Mapping[str, Rounding]) -> None:
    """Every channel is rounded by a fixed step, which the weights take over; products add their bias themselves."""
    sums = _sums(graph)
    folded = {total for _, total in sums.values()}
    rounded: set[str] = set()
    for node in graph.node:
        if not _is_product(node, parts.weights):
            if node.output[0] not in folded:
                parts.nodes.append(node)
            continue
        source, weight = node.input
        rounding, unit, zero = roundings[source], f"{source}.unit", f"{source}.zero"
        if source not in rounded:
            rounded.add(source)
            parts.constant(f"{source}.per_step", 1 / rounding.steps)
            parts.constant(zero, np.uint8(rounding.zero))
            parts.nodes.append(helper.make_node("Mul", [source, f"{source}.per_step"], [unit]))
            parts.nodes.append(helper.make_node("QuantizeLinear", [unit, ONE, zero], [f"{source}.int8"]))
        bias, output = sums.get(node.output[0], (None, node.output[0]))
        parts.product(source, weight, zero, output, rounding.steps[:, None], bias)


def _sums(graph: GraphProto) -> dict[str, tuple[str, str]]:
    """Of every product that is used only to add a bias: by its name the bias and the sum."""
    sizes = {weight.name: list(weight.dims) for weight in graph.initializer}
    width = {node.output[0]: weight.dims[1] for node, weight in products(graph)}
    uses = Counter([*(name for node in graph.node for name in node.input), *(info.name for info in graph.output)])
    found = {}
    for node in graph.node:
        for product, bias in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            if product in width and uses[product] == 1 and sizes.get(bias) == [width[product]]:
                found[product] = (bias, node.output[0])
    return found


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


def _round_columns(matrix: np.ndarray, name: str) -> Iterator[TensorProto]:
    """`[K, N]` in 8 bits, and the scale and zero of every column."""
    scale = np.maximum(np.abs(matrix).max(0), 1e-30).astype(np.float32) / LARGEST
    yield numpy_helper.from_array(np.rint(matrix / scale).astype(np.int8), f"{name}.int8")
    yield numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale")
    yield numpy_helper.from_array(np.zeros(matrix.shape[1], np.int8), f"{name}.zero")
