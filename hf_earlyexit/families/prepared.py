"""Layers made ready to be walked: once for a model, and again as soon as anything about them has changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
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


class _Seen:
    """Some modules as they are now: their kinds, and all their attributes, parts, weights and hooks by identity.

    A look at every call has to be cheap, so attributes are compared as one list, in which nothing is looked up by name.

    Args:
        modules: to be seen.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules, self.kinds = modules, [*map(type, modules)]
        self.attributes = [*map(vars, modules)]
        self.values = _in_one(self.attributes)
        tables = [value for value in self.values if isinstance(value, dict)]
        self.full, self.empty = ([table for table in tables if bool(table) == full] for full in (True, False))
        self.entries = _in_one(self.full)

    def stand(self) -> bool:
        """Whether nothing about the modules has changed."""
        alike = [*map(type, self.modules)] == self.kinds and not any(self.empty)
        return alike and _in_one(self.full) == self.entries and _in_one(self.attributes) == self.values


class _Known(NamedTuple):
    """What was made ready, and all it was made from."""

    family: Family
    config: dict[str, Any]
    stock: list[nn.Module]
    seen: _Seen
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
    packs = family.packs(base)
    ready = [family.packed_layer(layer) if packs else partial(family.call, layer) for layer in layers]
    return _Known(family, dict(vars(base.config)), layers, _Seen(list(once)), Prepared(packs, ready))


def _is_as_it_was(known: _Known, base: Any) -> bool:
    stock = known.family.layers_of(base)
    if len(stock) != len(known.stock) or not all(map(is_, stock, known.stock)):
        return False
    try:
        return vars(base.config) == known.config and known.seen.stand()
    except (RuntimeError, ValueError):  # a tensor or an array in the place of another: they do not compare to a truth
        return False


def _in_one(tables: list[dict[str, Any]]) -> list[Any]:
    """The values of some dicts, as one list."""
    return list(chain.from_iterable(map(dict.values, tables)))
