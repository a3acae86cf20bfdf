"""Names of a package that are loaded when they are first used."""

from importlib import import_module
from typing import Any


def load(package: str, homes: dict[str, str], name: str) -> Any:
    """What a package calls `name`, for its `__getattr__`.

    Args:
        package: its dotted name.
        homes: the module below it that holds each of its names.
        name: what was asked for.

    Raises:
        AttributeError: for a name that it has not.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{homes[name]}"), name)
