"""The whole walk of a model as one flat ONNX graph: every layer, every exit, no choice yet."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..modeling.classifier import EarlyExitClassifier
from ..modeling.exits import require_float32_on_cpu

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TOKENS, EMBEDDED = "tokens", "hidden_0"  # attention_mask as booleans; hidden states before the first layer


def hidden_after(layer: int) -> str:
    """Name of the hidden states `[B, T, H]` after layer `layer` (1-based)."""
    return f"hidden_{layer}"


def logits_of(exit_index: int) -> str:
    """Name of the logits `[B, C]` of exit `exit_index` (0-based)."""
    return f"logits_{exit_index}"


def gate_of(exit_index: int) -> str:
    """Name of the leave logit `[B]` of exit `exit_index` (0-based)."""
    return f"gate_{exit_index}"


class _Walk(nn.Module):
    """Everything a walker can ask of a model, in one call."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> dict[str, Tensor]:
        model, tokens = self.model, attention_mask.bool()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        hidden = model.family.embedded(model.base_model, inputs)
        context = model.family.context(model.base_model, hidden, tokens, {}, {}, traced=True)
        named = {TOKENS: tokens, EMBEDDED: hidden}
        exit_at = {layer: index for index, layer in enumerate(model.exit_layers)}
        for layer in range(1, model.exit_layers[-1] + 1):
            hidden = named[hidden_after(layer)] = model.run_layer(layer, hidden, context)
            if layer in exit_at:
                signal = model.exit_signal(exit_at[layer], hidden, context, True)
                named[logits_of(exit_at[layer])] = signal.logits
                if signal.gate is not None:
                    named[gate_of(exit_at[layer])] = signal.gate
        return named


def walk_graph(model: Any) -> onnx.ModelProto:
    """Trace a model's walk.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.

    Returns:
        A graph from `INPUTS` to tokens, hidden states, logits and gates, by the names above; dynamic batch and length.

    Raises:
        UsageError: for a model of another kind, on another device or of another precision.
    """
    kind = type(model)
    if not issubclass(kind, EarlyExitClassifier):
        raise UsageError(f"{kind.__name__} cannot be exported; expected a classifier with exits.", field="model")
    model.family.require_traceable()
    require_float32_on_cpu(model, "ONNX")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # the plainest graph; the sums are the same
    walk = _Walk(model)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=model.family.longest(model.config))
    example = tuple(torch.full((2, 3), value) for value in (1, 1, 0))  # three tensors: one given twice would be one input
    return export(walk, example, INPUTS, list(walk(*example)), {0: batch, 1: length})


def export(
    module: nn.Module, example: tuple[Tensor, ...], inputs: Any, outputs: Any, dynamic: dict[int, Any] | None
) -> onnx.ModelProto:
    """One module as an ONNX graph; `dynamic` axes are those of every input."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=None if dynamic is None else tuple(dynamic for _ in example),
            dynamo=True,
            verbose=False,
        )
    return _bare(program.model_proto)  # type: ignore[union-attr]


def _bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces, which name places of this machine."""
    for part in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    model.graph.ClearField("value_info")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notes on packages that are not needed here."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
