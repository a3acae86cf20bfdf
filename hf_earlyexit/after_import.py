"""Work that waits until a module of another package is loaded, so that importing this package stays cheap."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

Action = Callable[[], Any]


def after_import(name: str, action: Action) -> None:
    """Call `action` once the module `name` is loaded: now, if it is; otherwise before whoever imports it goes on.

    `action` may import what it likes: it is called when that thread has no half loaded module of the same package or of this
    one any more.

    Args:
        name: dotted name of a module that is no part of this package.
        action: called once, without arguments.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watch(name, action))


class _Watch:
    """Lets all modules be loaded as always, and counts those of the packages concerned that are half loaded."""

    def __init__(self, name: str, action: Action) -> None:
        self.name, self.action = name, action
        self.packages = {name.partition(".")[0], __name__.partition(".")[0]}
        self.half_loaded = threading.local()  # other threads' imports are none of this thread's

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else [PathFinder]
        for finder in others:
            find: Any = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        load = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # the loader is again as it was made
            depth = getattr(self.half_loaded, "depth", 0)
            self.half_loaded.depth = depth + 1
            try:
                load(module)
            finally:
                self.half_loaded.depth = depth
            if depth == 0 and self.name in sys.modules:
                try:
                    sys.meta_path.remove(self)
                except ValueError:  # done already
                    return
                self.action()

        loader.exec_module = exec_module
