"""Pages for people: one HTML file that needs nothing else. Needs the [report] or the [caption] extra."""

from typing import Any

from ..lazy import load

_HOMES = {
    "write_report": "write",
}

__all__ = ["write_report"]


def __getattr__(name: str) -> Any:
    return load(__name__, _HOMES, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
