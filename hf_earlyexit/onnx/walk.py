"""The whole walk of a model as one flat ONNX graph: every layer, every exit, no choice yet."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..families.base import IMAGE, Family
from ..families.checks import picture_of
from ..modeling.classifier import EarlyExitClassifier
from ..modeling.exits import require_float32_on_cpu
from ..modeling.protocol import ExitModel, TorchExitClassifier
from ..serving.tables import PIXELS
from ..signals import SIGNALS, known_signals
from ..walking.step import every_exit
from .inputs import IDS

SIGNAL = "signal_"
TOKENS, EMBEDDED = "tokens", "hidden_0"  # attention_mask as booleans; hidden states before the first layer


def hidden_after(layer: int) -> str:
    """Name of the hidden states `[B, T, H]` after layer `layer` (1-based)."""
    return f"hidden_{layer}"


def logits_of(exit_index: int) -> str:
    """Name of the logits `[B, C]` of exit `exit_index` (0-based)."""
    return f"logits_{exit_index}"


def scalar_of(name: str, exit_index: int) -> str:
    """Name of the signal `name` `[B]` of exit `exit_index` (0-based)."""
    return f"{SIGNAL}{name}_{exit_index}"


class _Walk(nn.Module):
    """Everything a walker can ask of a model, in one call.

    Args:
        model: the classifier.
        inputs: names of its inputs.
        signals: names of what its exits give beside their logits.
    """

    def __init__(self, model: TorchExitClassifier, inputs: Sequence[str], signals: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.signals = model, inputs, signals

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        model, inputs = self.model, dict(zip(self.inputs, tensors, strict=True))
        mask = inputs.get("attention_mask")
        tokens = None if mask is None else mask.bool()
        hidden = model.family.embedded(model.base_model, inputs)
        context = model.family.context(model.base_model, hidden, tokens, {}, {}, traced=True)
        named = {EMBEDDED: hidden} if tokens is None else {TOKENS: tokens, EMBEDDED: hidden}
        for layer, after, index, signal in every_exit(model, hidden, context, self.signals):
            named[hidden_after(layer)] = after
            if index is not None and signal is not None:
                named[logits_of(index)] = signal.logits
                named |= {scalar_of(name, index): values for name, values in signal.scalars.items()}
        return named


def exported_signals(model: ExitModel) -> tuple[str, ...]:
    """Names of the signals that an export holds: those that are learned, and those that the model's policies ask for."""
    points = (None, *model.operating_points)
    policies = [policy for policy in map(model.policy_at, points) if policy is not None]
    asked = {name for policy in policies for name in known_signals(policy.asks)}
    return tuple(name for name in model.signals if name in asked or SIGNALS.get(name).learned)


def walk_graph(
    model: TorchExitClassifier, signals: Sequence[str] | None = None, picture: tuple[int, ...] | None = None
) -> onnx.ModelProto:
    """Trace a model's walk.

    Args:
        model: a float32 classifier with exits, on the CPU. It is not changed.
        signals: names of what its exits give beside their logits; as `exported_signals` by default.
        picture: channels, height and width of the pictures it reads; those of its config by default.

    Returns:
        A graph from the inputs, token ids or pixel values, to real tokens (of texts), hidden states, logits and signals, by
        the names above; of any number of rows, and texts of any length.

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
    inputs, example, dynamic = _example(model.family, model.config, picture)
    walk = _Walk(model, inputs, exported_signals(model) if signals is None else signals)
    return export(walk, example, inputs, list(walk(*example)), (tuple(dynamic for _ in example),))


def _example(
    family: Family, config: Any, picture: tuple[int, ...] | None
) -> tuple[tuple[str, ...], tuple[Tensor, ...], dict[int, Any]]:
    """Names of a model's inputs, one batch of them, and the axes of each whose sizes are left open."""
    batch = torch.export.Dim("batch")
    if family.task == IMAGE:
        return (PIXELS,), (torch.zeros(2, *(picture or picture_of(config))),), {0: batch}
    length = torch.export.Dim("length", max=family.longest(config))
    example = tuple(torch.full((2, 3), value) for value in (1, 1, 0))  # three tensors: one given twice would be one input
    return IDS, example, {0: batch, 1: length}


def export(
    module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str], dynamic: Any
) -> onnx.ModelProto:
    """One module as an ONNX graph; sizes are fixed where `dynamic`, as `torch.export` takes it, leaves none open."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            example,
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_shapes=dynamic,
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
