"""Layers made ready to be walked: once for a model, and again as soon as anything about them has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import is_
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .base import Family

Layer = Callable[[Tensor, Any], Tensor]


class Prepared(NamedTuple):
    """Layers of a model, as functions of hidden states and their context.

    Attributes:
        packs: whether rows stand end to end: hidden states are `[tokens, H]` and the context is a `Packed`.
        layers: in order; one may come again.
    """

    packs: bool
    layers: list[Layer]


class _Known(NamedTuple):
    """What was made ready, and all it was made from."""

    family: Family
    config: dict[str, Any]
    stock: list[nn.Module]
    parts: list[tuple[nn.Module, type, dict[str, Any]]]
    prepared: Prepared


_KNOWN: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()  # by backbone; what is known holds no backbone
_KNOWING = Lock()


def prepared(family: Family, base: Any, pack: bool = True) -> Prepared:
    """The layers of a stock backbone, ready to be walked.

    Every call looks whether every module of the layers is as it was; values of weights that change in place need no look, as
    layers hold the very weights.

    Args:
        family: of the backbone.
        base: the stock backbone.
        pack: let rows stand end to end where the model allows it.
    """
    if not pack:
        return Prepared(False, [partial(family.call, layer) for layer in family.layers_of(base)])
    known = _KNOWN.get(base)
    if known is None or known.family is not family or not _is_as_it_was(known, base):
        known = _new(family, base)
        with _KNOWING:
            _KNOWN[base] = known
    return known.prepared


def _new(family: Family, base: Any) -> _Known:
    layers = list(family.layers_of(base))
    once = dict.fromkeys(part for layer in layers for part in layer.modules())
    parts = [(part, type(part), _seen(vars(part))) for part in once]
    packs = family.packs(base)
    ready = [family.packed_layer(layer) if packs else partial(family.call, layer) for layer in layers]
    return _Known(family, _seen(vars(base.config)), layers, parts, Prepared(packs, ready))


def _is_as_it_was(known: _Known, base: Any) -> bool:
    stock = known.family.layers_of(base)
    if len(stock) != len(known.stock) or not all(map(is_, stock, known.stock)):
        return False
    try:
        return vars(base.config) == known.config and all(
            type(part) is kind and vars(part) == seen for part, kind, seen in known.parts
        )
    except (RuntimeError, ValueError):  # a tensor or an array in the place of another: they do not compare to a truth
        return False


def _seen(values: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module as they are now: its parts, weights and hooks by identity."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
