"""The ways to answer rows with one torch model: in full, cut off, and with early exit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from ..errors import UsageError
from ..modeling.protocol import TorchExitClassifier
from ..serving.batching import pad_batch, padding_token
from ..serving.graph_walker import walker_for
from ..serving.rows import TokenIds
from ..serving.scheduler import Scheduler
from ..transfer import finished

STOCK, FULL = "full, arrival order", "full"
FORWARD, EARLY, ONE_FILE = "early exit, arrival order", "early exit", "early exit, one file"
FIRST = "first {} layers"  # a model that was cut off
Run = Callable[[Sequence[TokenIds]], Any]


class Ways(NamedTuple):
    """Ways to answer rows, by name: a whole set at once, and one row at a time."""

    many: dict[str, Run]
    single: dict[str, Run]


class Form(Protocol):
    """A model in one format and engine that knows its ways itself."""

    served: Any  # the classifier that answers early, for `predict`

    def ways(self, batch_size: int, static_layer: int) -> Ways:
        """All its ways.

        Args:
            batch_size: rows of a batch.
            static_layer: layers of the model that always stops there.
        """


def torch_ways(
    model: TorchExitClassifier, batch_size: int, static_layer: int, stock_model: TorchExitClassifier | None = None
) -> Ways:
    """Ways to answer rows with a torch model.

    Args:
        model: a classifier with exits and a policy.
        batch_size: rows of a batch in arrival order, padded to the longest.
        static_layer: layers of the model that always stops there, for comparison.
        stock_model: whose stock forward is the rival; the model itself by default.
    """
    walker, policy = walker_for(model), model.exit_policy
    budget, pad = walker.best_batch_tokens, padding_token(model.config)
    full, early = Scheduler(walker, None, budget), Scheduler(walker, policy, budget)
    static = Scheduler(walker, None, budget, layer_budget=static_layer)

    def in_batches(call: Callable[[dict[str, Any]], Any], size: int) -> Run:
        @torch.inference_mode()
        def run(rows: Sequence[TokenIds]) -> None:
            for start in range(0, len(rows), size):
                call(dict(pad_batch(rows[start : start + size], pad).to(walker.device)))
            finished(walker.device)

        return run

    stock, first = _stock_forward(stock_model or model), FIRST.format(static_layer)

    def forward(batch: dict[str, Any]) -> Any:
        return model(**batch, early_exit=True)

    return Ways(
        many={STOCK: in_batches(stock, batch_size), FULL: full.run, FORWARD: in_batches(forward, batch_size),
              EARLY: early.run, first: static.run},
        single={STOCK: in_batches(stock, 1), FORWARD: in_batches(forward, 1), EARLY: early.run, first: static.run},
    )  # fmt: skip


def _stock_forward(model: TorchExitClassifier) -> Callable[[dict[str, Any]], Any]:
    """The stock class's own forward, on the very weights: what a plain checkpoint of the family costs."""
    stock: Any = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return lambda batch: stock.forward(model, **batch).logits


def exit_at(exit_layers: Sequence[int], layer: int) -> int:
    """The exit (0-based) after a layer.

    Raises:
        UsageError: if there is none.
    """
    if layer not in exit_layers:
        raise UsageError(
            f"There is no exit after layer {layer}; expected one of {', '.join(map(str, exit_layers))}.",
            field="static_layer",
            value=layer,
        )
    return exit_layers.index(layer)
