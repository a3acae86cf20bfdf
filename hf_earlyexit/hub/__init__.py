"""Sharing models: one folder that tells all, and one commit that carries it."""

from ..lazy import lazy_names

_HOMES = {
    "card_figures": "figures",
}

__all__ = ["card_figures"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
