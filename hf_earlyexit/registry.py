"""Names to objects, with a suggestion for every misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from .errors import UnknownNameError
from .values import shown

T = TypeVar("T")


def unknown_name(kind: str, name: Any, known: Iterable[str]) -> UnknownNameError:
    """The error for a name that is not among the known ones, with the nearest of them and the whole list."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name) if isinstance(name, str) and len(name) < 100 else "", names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UnknownNameError(f"Unknown {kind} {shown(name)}.{hint} Known: {', '.join(names)}.", field=kind, value=name)


class Registry(Generic[T]):
    """A table of named things of one kind.

    Args:
        kind: what the things are, for error messages ("policy").
        group: entry-point group from which third parties add their own; read at the first look-up.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self._group = group
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that puts the decorated object under `name`.

        Raises:
            UnknownNameError: if the name is already taken by another object.
        """

        def put(item: T) -> T:
            if self._items.get(name, item) is not item:
                raise UnknownNameError(f"The {self.kind} name {name!r} is taken; choose another.", field="name", value=name)
            self._items[name] = item
            return item

        return put

    def names(self) -> list[str]:
        """All known names, sorted."""
        self._load_entry_points()
        return sorted(self._items)

    def listed(self) -> str:
        """All known names in words, for help texts: "a, b or c"."""
        *first, last = self.names()
        return f"{', '.join(first)} or {last}" if first else last

    def get(self, name: str) -> T:
        """The object called `name`.

        Raises:
            UnknownNameError: with the nearest name and the whole list.
        """
        self._load_entry_points()
        if isinstance(name, str) and name in self._items:
            return self._items[name]
        raise unknown_name(self.kind, name, self._items)

    def _load_entry_points(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            for point in entry_points(group=group):
                try:
                    item = point.load()
                except Exception as error:
                    raise UnknownNameError(
                        f"The {self.kind} {point.name!r} of a plugin cannot be loaded from {point.value} ({error}); "
                        "fix or uninstall it.",
                        field="name",
                        value=point.name,
                    ) from error
                self.register(point.name)(item)
