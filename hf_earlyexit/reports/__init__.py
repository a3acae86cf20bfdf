"""Pages for people: one HTML file that needs nothing else. Needs the [report] or the [caption] extra."""

from ..lazy import lazy_names

_HOMES = {
    "write_report": "write",
}

__all__ = ["write_report"]

__getattr__, __dir__ = lazy_names(__name__, _HOMES, __all__)
