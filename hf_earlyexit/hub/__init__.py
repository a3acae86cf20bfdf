"""Sharing models: one folder that tells all, and one commit that carries it."""

from typing import Any

from ..lazy import load

_HOMES = {
    "card_figures": "figures",
}

__all__ = ["card_figures"]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
