"""How long things take, on this machine."""

from ..lazy import lazy_names

_HOMES = {"space_exits": "spacing", "Spacing": "spacing"}

__all__ = ["Spacing", "space_exits"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
