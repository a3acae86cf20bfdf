"""How a classifier is walked on an accelerator, and which way of walking suits a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from threading import Lock
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from ..families.attention import places_of
from ..families.base import LAST, TEXT, is_watched
from ..families.bounded import bounded_context
from ..families.packed import Packed
from ..modeling.protocol import ExitClassifier, TorchExitClassifier, TorchExitModel
from ..policies.base import ExitPolicy, ExitStep
from ..signals import ExitSignal
from ..walking.step import Moved, Standing
from .capturing import nothing_from_the_host
from .cuda_graphs import CudaCapture, Outputs, SegmentGraphs, StayAt
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


class Name(NamedTuple):
    """What one graph does: layers (1-based), the exit behind them, the signals asked of it, and the policy that steps."""

    layers: range
    exit_index: int | None
    asks: tuple[str, ...]
    policy: ExitPolicy | None = None

    def __str__(self) -> str:
        layers = f"layers {self.layers.start} to {self.layers.stop - 1}, exit {self.exit_index}"
        signals = f"signals {', '.join(self.asks) or 'none'}"
        return f"{layers}, {signals}" + (f", policy {self.policy.name}" if self.policy is not None else "")


class GraphWalker(ModelWalker):
    """Walks rows that stand end to end from exit to exit, each time by one graph; looks at no value on the device.

    Where the policy can be captured it steps within the graph, which puts the rows that stay in front: what goes on is then
    the front of what the graph left, and nothing is brought from the host.

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
        name = Name(layers, exit_index, tuple(asks))
        hidden, given, _ = self._by_graph(name, self._segment, hidden, context)
        return hidden, ExitSignal(given[0], dict(zip(asks, given[1:], strict=True))) if given else None

    def step(
        self, layers: range, rows: Standing, policy: ExitPolicy | None, exit_index: int | None
    ) -> tuple[Standing, ExitStep | None, Moved | None]:
        hidden, context, state, stay = rows
        if stay is not None:
            stay.check()
        graph = bool(layers) and context.real is None
        if policy is None or exit_index is None or not graph or not is_captured(policy, self.num_classes):
            return super().step(layers, rows, policy, exit_index)
        name = Name(layers, exit_index, policy.asks_at(exit_index), policy)
        kind, parts = type(state), () if state is None else tuple(state)
        hidden, given, stay = self._by_graph(
            name, partial(self._decided, kind), hidden, context, parts, cast(StayAt | None, stay), lend=True
        )
        leave, order, ends, score, answer, *after = given
        step = ExitStep(kind(*after) if after else None, score, answer, leave)
        return Standing(hidden, context, step.state, stay), step, Moved(order, functional.pad(ends, (1, 0)))

    def _by_graph(
        self,
        name: Name,
        segment: Callable[..., Any],
        hidden: Tensor,
        context: Packed,
        of_rows: Sequence[Tensor] = (),
        stay: StayAt | None = None,
        lend: bool = False,
    ) -> tuple[Tensor, Outputs, StayAt | None]:
        assert context.bounds is not None
        return self.graphs.run(name, partial(segment, name), hidden, context.bounds, context.lengths, of_rows, stay, lend)

    def _segment(self, name: Name, hidden: Tensor, bounds: Tensor, width: int) -> tuple[Tensor, None, Outputs]:
        """Layers and the exit behind them."""
        hidden, signal = self._signal(name, hidden, bounds, width)
        return hidden, None, () if signal is None else (signal.logits, *(signal.scalars[one] for one in name.asks))

    def _signal(self, name: Name, hidden: Tensor, bounds: Tensor, width: int) -> tuple[Tensor, ExitSignal | None]:
        context = bounded_context(self.family, self.base, hidden, bounds, width)
        return super().run(name.layers, hidden, context, name.exit_index, name.asks)

    def _decided(
        self, kind: type, name: Name, hidden: Tensor, bounds: Tensor, width: int, *parts: Tensor
    ) -> tuple[Tensor, Tensor, Outputs]:
        """Layers, the exit behind them and the policy; then rows change places, those who stay to the front."""
        hidden, signal = self._signal(name, hidden, bounds, width)
        assert name.policy is not None
        assert name.exit_index is not None
        assert signal is not None
        step = name.policy.step(kind(*parts) if parts else None, signal, name.exit_index)
        order, ends, tokens = stayers_first(bounds, step.leave, len(hidden))
        of_rows = (step.score, step.answer, *(step.state or ()))
        return hidden, tokens, (step.leave, order, ends, *(part[order] for part in of_rows))


def stayers_first(bounds: Tensor, leave: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which rows that stay come first, then those who leave, then empty ones; each kind as it stood.

    Args:
        bounds: position of each row's first token, and of the token behind the last row's `[B + 1]`.
        leave: who leaves `[B]`.
        tokens: that there is room for.

    Returns:
        Where each row was `[B]`, the position behind its last token now `[B]`, and where each token was `[tokens]`.
    """
    length = bounds.diff()
    order = (leave.long() + 2 * (length == 0).long()).argsort(stable=True)
    after = functional.pad(length[order].cumsum(0), (1, 0))
    row, place = places_of(after, tokens)
    return order, after[1:], (bounds[order[row]] + place).clamp_max(tokens - 1)


@lru_cache(maxsize=256)
def _captured(policy: ExitPolicy, num_classes: int) -> bool:
    rows, device = 2, torch.device("meta")  # whose tensors have no values: a look at one is an error
    logits, score = torch.empty(rows, num_classes, device=device), torch.empty(rows, device=device)
    try:
        state = policy.init_state(rows, num_classes, device)
        with torch.inference_mode(), nothing_from_the_host():
            for index in filter(policy.wants, range(policy.num_exits)):
                state = policy.step(state, ExitSignal(logits, dict.fromkeys(policy.asks_at(index), score)), index).state
    except Exception:  # whatever it is that keeps a rule from running without values
        return False
    return True


def is_captured(policy: ExitPolicy, num_classes: int) -> bool:
    """Whether a policy can step within a graph: it looks at no value, and brings nothing but numbers from the host."""
    try:
        return _captured(policy, num_classes)
    except TypeError:  # its numbers cannot name a graph
        return False


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
