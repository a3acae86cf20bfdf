"""How a classifier is walked on an accelerator, and which way of walking suits a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..families.base import LAST, TEXT, is_watched
from ..families.bounded import bounded_context
from ..families.packed import Packed
from ..modeling.protocol import ExitClassifier, TorchExitClassifier, TorchExitModel
from ..signals import ExitSignal
from .cuda_graphs import CudaCapture, Outputs, SegmentGraphs
from .walker import BatchWalker, ModelWalker

_KNOWN: WeakKeyDictionary[Any, dict[Any, SegmentGraphs]] = WeakKeyDictionary()  # by model, then stream and parts
_KNOWING = Lock()


def walker_for(model: ExitClassifier, cuda_graphs: bool = True) -> BatchWalker:
    """The walker that suits a model and its device.

    Args:
        model: a classifier with exits.
        cuda_graphs: use graphs where the model is on a CUDA device and nobody has hooked or wrapped its modules.
    """
    walker: BatchWalker | None = getattr(model, "walker", None)
    if walker is not None:
        return walker
    model = cast(TorchExitClassifier, model)  # only exported ones bring a walker
    if cuda_graphs and model.device.type == "cuda" and captures(model):
        return GraphWalker(model, _graphs_of(model, torch.cuda.current_stream(model.device)))
    return ModelWalker(model)


def captures(model: TorchExitClassifier) -> bool:
    """Whether a model's rows stand end to end, its layers look at no value, and no hook would miss a replay."""
    family = model.family
    traced = family.task == TEXT and not family.untraced and family.token != LAST  # graphs do not know who answers
    return traced and family.packs(model.base_model) and not is_watched(model.modules())


class GraphWalker(ModelWalker):
    """Walks rows that stand end to end from exit to exit, each time by one graph; looks at no value on the device.

    Args:
        model: a classifier with exits that `captures` can tell of.
        graphs: of this very model with these very weights.
    """

    lanes = 2  # one chunk's decisions travel while the other computes

    def __init__(self, model: TorchExitClassifier, graphs: SegmentGraphs) -> None:
        super().__init__(model)
        self.graphs = graphs
        self.weights = [weight.data for weight in model.parameters()]  # graphs know them by address: keep them there

    def run(
        self, layers: range, hidden: Tensor, context: Packed, exit_index: int | None, asks: Sequence[str] = ()
    ) -> tuple[Tensor, ExitSignal | None]:
        if context.real is not None:  # tokens that nobody may look at stand among the others
            return super().run(layers, hidden, context, exit_index, asks)
        segment = partial(self._segment, layers, exit_index, asks)
        name = f"layers {layers.start} to {layers.stop - 1}, exit {exit_index}, signals {', '.join(asks) or 'none'}"
        hidden, given = self.graphs.run(name, segment, hidden, context.lengths)
        return hidden, ExitSignal(given[0], dict(zip(asks, given[1:], strict=True))) if given else None

    def _segment(
        self, layers: range, exit_index: int | None, asks: Sequence[str], hidden: Tensor, bounds: Tensor, width: int
    ) -> tuple[Tensor, Outputs]:
        context = bounded_context(self.family, self.base, hidden, bounds, width)
        hidden, signal = super().run(layers, hidden, context, exit_index, asks)
        return hidden, () if signal is None else (signal.logits, *(signal.scalars[name] for name in asks))


def _graphs_of(model: TorchExitModel, stream: Any) -> SegmentGraphs:
    """The graphs of a model on a stream, as long as its modules are the same and its weights stay where they are."""
    weights = [*model.parameters(), *model.buffers()]
    parts: Any = (
        [(weight.data_ptr(), weight.dtype, weight.shape) for weight in weights],
        [id(part) for part in model.modules()],
    )
    key = (stream, tuple(map(tuple, parts)))
    with _KNOWING:
        known = _KNOWN.setdefault(model, {})
        for outdated in [other for other in known if other[1] != key[1]]:
            del known[outdated]
        if key not in known:
            known[key] = SegmentGraphs(CudaCapture(model.device))
        return known[key]
