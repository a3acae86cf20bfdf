"""Padded batches of rows of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from inspect import unwrap
from itertools import chain
from operator import attrgetter
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from transformers import BatchEncoding

from ..errors import UsageError
from ..modeling.protocol import ExitModel
from .tables import PIXELS

Model = TypeVar("Model", bound=ExitModel | nn.Module)


def batch_places(lengths: Sequence[int], max_batch_tokens: int) -> Iterator[list[int]]:
    """Places of rows of similar length that make a batch, the longest first.

    Args:
        lengths: tokens of every row.
        max_batch_tokens: most padded tokens in a batch; a longer row stands alone.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        places = order[start : start + max(max_batch_tokens // max(lengths[order[start]], 1), 1)]
        yield places
        start += len(places)


def sorted_batches(
    encoded: Sequence[dict[str, Any]],
    max_batch_tokens: int,
    pad_token_id: int = 0,
    length: Callable[[Any], int] = lambda row: len(row["input_ids"]),
) -> Iterator[tuple[list[int], BatchEncoding]]:
    """Padded batches of rows of similar length, the longest first, with the rows' places.

    Args:
        encoded: token ids of every row; or pixel values, of one size.
        max_batch_tokens: most padded tokens in a batch; a longer row stands alone.
        pad_token_id: stands at padding; see `padding_token`.
        length: of a row, in tokens.
    """
    for places in batch_places([length(row) for row in encoded], max_batch_tokens):
        yield places, pad_batch([encoded[place] for place in places], pad_token_id)


def padding_token(config: Any) -> int:
    """The token that stands at padding: the model's own, by which decoders find a row's end; 0 where it has none.

    Some checkpoints of Llama say -1, which no vocabulary has.
    """
    return max(getattr(config, "pad_token_id", None) or 0, 0)


def pad_batch(rows: Sequence[dict[str, Any]], pad_token_id: int = 0) -> BatchEncoding:
    """One batch of tensors `[B, T]`, padded on the right, with an attention mask; or of images of one size, stacked.

    A row without `attention_mask` has real tokens only, one without `token_type_ids` has zeros, whatever others have.
    """
    if PIXELS in rows[0]:
        return BatchEncoding({PIXELS: torch.stack([row[PIXELS] for row in rows])})
    lengths = np.array([len(row["input_ids"]) for row in rows])
    real = np.arange(lengths.max()) < lengths[:, None]  # [B, T]
    columns = {"input_ids": pad_token_id, "attention_mask": 0, "token_type_ids": 0}  # what a token of padding has
    if not any("token_type_ids" in row for row in rows):
        del columns["token_type_ids"]
    missing = {"attention_mask": [1], "token_type_ids": [0]}  # what every token has in a row without the column
    batch = {}
    for name, padding in columns.items():
        filled = np.full(real.shape, padding)
        values = [row.get(name) or missing.get(name, []) * len(row["input_ids"]) for row in rows]
        filled[real] = np.fromiter(chain.from_iterable(values), filled.dtype, int(lengths.sum()))
        batch[name] = torch.from_numpy(filled)
    return BatchEncoding(batch)


def evaluating(model: Model) -> Model:
    """The model itself where it evaluates already; else a view of it that does: the same weights, nothing written.

    The view sees what becomes of the weights and has the hooks of the model, but its modules are others, so threads may
    share a model in training mode. Ask for it after hooks have been put on the model.

    Args:
        model: a torch model, or anything else with `modules()`.

    A model that the Trainer has run in mixed precision still has Accelerate's `forward`; the view has that of its class, as
    the model has once it is saved and loaded.

    Raises:
        UsageError: for a model in training mode whose modules have been given another `forward`, which only knows the mode
            of the model itself.
    """
    if not isinstance(model, nn.Module) or not _trains(model):
        return model
    return cast(Model, _view(model, {}))


def _trains(model: nn.Module) -> bool:
    """Whether any module is in training mode; `modules()` takes several times as long, at every call of a model."""
    level = [model]
    while level:
        if any(map(attrgetter("training"), level)):
            return True
        children = chain.from_iterable(map(dict.values, map(attrgetter("_modules"), level)))
        level = [child for child in children if child is not None]
    return False


def _view(module: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if (view := known.get(id(module))) is not None:
        return view
    if "forward" in vars(module) and not _is_accelerated(module):
        raise UsageError(
            f"The model is in training mode, and its {type(module).__name__} has been given another forward, which would "
            "run with dropout: call model.eval() first.",
            field="model",
        )
    view = known[id(module)] = object.__new__(type(module))
    hooks = {name: value.copy() for name, value in vars(module).items() if "_hooks" in name and isinstance(value, dict)}
    compiled = {"_compiled_call_impl": None}  # it would run the module itself
    children = {name: child if child is None else _view(child, known) for name, child in module._modules.items()}
    vars(view).update({**vars(module), **hooks, **compiled, "_modules": children, "training": False})
    vars(view).pop("forward", None)
    return view


def _is_accelerated(module: nn.Module) -> bool:
    """Whether a module's own `forward` is that of its class, or that in Accelerate's mixed precision."""
    own: Any = vars(module)["forward"]
    own = getattr(own, "__func__", own)
    if "_original_forward" in vars(module):
        own = unwrap(own)
    of_class = type(module).forward
    return own is of_class or own is unwrap(of_class)  # what Accelerate puts back has lost its decorators
