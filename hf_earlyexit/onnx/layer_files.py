"""The graphs of the batched form: one to begin, one per layer, one per exit."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto

from ..signals import SIGNALS
from .graphs import inputs_of, sizes_of, subgraph
from .walk import EMBEDDED, TOKENS, hidden_after, logits_of, scalar_of

BEGIN = "begin.onnx"


def layer_file(layer: int) -> str:
    """File of layer `layer` (1-based)."""
    return f"layer-{layer:02d}.onnx"


def exit_file(exit_index: int) -> str:
    """File of exit `exit_index` (0-based)."""
    return f"exit-{exit_index:02d}.onnx"


def cut_pieces(whole: ModelProto, config: Any) -> dict[str, bytes]:
    """All files of the batched form."""
    made = {info.name for info in whole.graph.output}
    states = sizes_of(whole, EMBEDDED)
    tokens = {TOKENS: (TensorProto.BOOL, states[:2])} if TOKENS in made else {}

    def hidden(name: str) -> dict[str, Any]:
        return {name: (TensorProto.FLOAT, states)}

    pieces = {BEGIN: subgraph(whole, inputs_of(whole), hidden(EMBEDDED))}
    for layer in range(1, config.num_hidden_layers + 1):
        given = {**hidden(hidden_after(layer - 1)), **tokens}
        pieces[layer_file(layer)] = subgraph(whole, given, hidden(hidden_after(layer)))
    for index, layer in enumerate(config.exit_layers):
        names = [name for name in SIGNALS.names() if scalar_of(name, index) in made]
        outputs: dict[str, Any] = {logits_of(index): (TensorProto.FLOAT, ("batch", "classes"))}
        outputs |= {scalar_of(name, index): (TensorProto.FLOAT, ("batch",)) for name in names}
        given = {**hidden(hidden_after(layer)), **tokens}
        if any(SIGNALS.get(name).reads_states for name in names):
            given |= hidden(hidden_after(layer - 1))
        pieces[exit_file(index)] = subgraph(whole, given, outputs)
    return {name: piece.SerializeToString() for name, piece in pieces.items()}
