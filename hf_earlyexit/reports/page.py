"""The pages' common way from a template to a file."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def write_page(template: str, path: str | PathLike[str], **values: Any) -> None:
    """Fill in a template of this folder and write it; texts are escaped, the file's folder is made if it is not there."""
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(environment.get_template(template).render(**values), encoding="utf-8")
