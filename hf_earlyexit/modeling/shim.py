"""Lets a saved folder load where the package is installed but was not imported.

`config.json` points the Auto classes to a file of one line that imports the model's classes from this package. It is used
with `trust_remote_code=True` only; once the package is imported the Auto classes know its models by themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE = __name__.partition(".")[0]
MODULE = f"modeling_{PACKAGE}"


class LoadedByShim:
    """Keeps transformers from copying this package's code into folders it saves: the shim imports it."""

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """As in transformers for classes of your own; without effect on the classes of this package."""
        if cls.__module__.partition(".")[0] != PACKAGE:
            super().register_for_auto_class(*args, **kwargs)  # type: ignore[misc]


def auto_map(config_name: str, model_name: str, auto_models: Iterable[str]) -> dict[str, str]:
    """What `config.json` tells the Auto classes."""
    return {"AutoConfig": f"{MODULE}.{config_name}", **dict.fromkeys(auto_models, f"{MODULE}.{model_name}")}


def write_shim(folder: Path, config_name: str, model_name: str) -> None:
    """Write the file that `auto_map` points to."""
    text = f"from {PACKAGE} import {config_name}, {model_name}\n"
    (folder / f"{MODULE}.py").write_text(text, encoding="utf-8")
