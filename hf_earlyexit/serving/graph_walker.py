"""How a classifier is walked on an accelerator, and which way of walking suits a model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import DataError
from ..families.base import LAST, TEXT, is_watched
from ..families.context import Context, widened
from ..modeling.protocol import ExitClassifier, TorchExitClassifier, TorchExitModel
from ..signals import ExitSignal
from .batching import pad_batch, padding_token
from .cuda_graphs import CudaCapture, Outputs, SegmentGraphs
from .rows import TokenIds, check_any_token
from .transfer import placed
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
    """Whether a model's layers can be traced without looking at values, and no hook would miss a replay."""
    family = model.family
    traced = family.task == TEXT and not family.untraced and family.token != LAST  # graphs know padding, not who answers
    return traced and not is_watched(model.modules())


class GraphWalker(ModelWalker):
    """Walks padded rows from exit to exit, each time by one graph; looks at no value on the device.

    Args:
        model: a classifier with exits that `captures` can tell of.
        graphs: of this very model with these very weights.
    """

    lanes = 2  # one chunk's decisions travel while the other computes

    def __init__(self, model: TorchExitClassifier, graphs: SegmentGraphs) -> None:
        super().__init__(model, pack=False)
        self.graphs = graphs
        self.weights = [weight.data for weight in model.parameters()]  # graphs know them by address: keep them there

    def check(self, row: TokenIds, number: int) -> DataError | None:
        return super().check(row, number) or check_any_token(row, number)  # it would attend to the padding

    def begin(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Context]:
        batch = pad_batch(rows, padding_token(self.base.config))
        given = {name: placed(values, self.device) for name, values in batch.items()}
        tokens = given["attention_mask"].bool()
        self.family.check(self.family, self.base, given)
        hidden = self.family.embedded(self.base, given)
        return hidden, Context(tokens=tokens, lengths=tuple(len(row["input_ids"]) for row in rows))

    def run(
        self, layers: range, hidden: Tensor, context: Context, exit_index: int | None, asks: Sequence[str] = ()
    ) -> tuple[Tensor, ExitSignal | None]:
        segment = partial(self._segment, layers, exit_index, asks)
        name = f"layers {layers.start} to {layers.stop - 1}, exit {exit_index}, signals {', '.join(asks) or 'none'}"
        hidden, given = self.graphs.run(name, segment, hidden, _padded(context)[0])
        return hidden, ExitSignal(given[0], dict(zip(asks, given[1:], strict=True))) if given else None

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]:
        width = max(hidden.shape[1] for hidden, _ in parts)
        hidden = torch.cat([widened(hidden, width) for hidden, _ in parts])
        known = [_padded(context) for _, context in parts]
        tokens = torch.cat([widened(tokens, width) for tokens, _ in known])
        return hidden, Context(tokens=tokens, lengths=tuple(length for _, lengths in known for length in lengths))

    def _segment(
        self, layers: range, exit_index: int | None, asks: Sequence[str], hidden: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Outputs]:
        context = self.family.context(self.base, hidden, tokens, {}, {}, traced=True)
        hidden, signal = super().run(layers, hidden, context, exit_index, asks)
        return hidden, () if signal is None else (signal.logits, *(signal.scalars[name] for name in asks))


def _padded(context: Context) -> tuple[Tensor, tuple[int, ...]]:
    """Which tokens are real `[B, T]` and the rows' lengths: always known here, where rows are padded to a bucket."""
    assert context.tokens is not None
    assert context.lengths is not None
    return context.tokens, context.lengths


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
