"""What an exported folder says of itself, and whether that is still true."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import inside, read_json

MANIFEST, ONE_FILE = "manifest.json", "model.onnx"
FORMAT = "hf_earlyexit.onnx/1"
PACKAGES = ("hf_earlyexit", "onnx", "onnxruntime", "torch", "transformers")
NEEDED = ("config", "dtype", "fingerprint", "files")
AGAIN = "Export the model again, or copy the folder again."


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    files = {path.name: _sum(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST}
    versions = {name: version(name) for name in PACKAGES}
    told = {"format": FORMAT, **values, "versions": versions, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**told, "sha256": _own_sum(told)}, indent=1, allow_nan=False) + "\n")


def read_manifest(folder: str | PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder, once every file it lists has been found as it was written.

    Raises:
        CheckpointError: naming the file that is missing, damaged or changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}; expected a folder that `hf-earlyexit export onnx` wrote.", path=path
        )
    told = read_json(path)
    if told.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {told.get('format')!r}; expected {FORMAT!r}. {AGAIN}", path=path)
    own = told.pop("sha256", None)
    if own != _own_sum(told) or any(name not in told for name in NEEDED):
        raise CheckpointError(f"{path} has been changed since it was written. {AGAIN}", field="sha256", path=path)
    for name, expected in told["files"].items():
        file = inside(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. {AGAIN}", field=name, path=file)
        if _sum(file) != expected:
            raise CheckpointError(f"{file} is damaged or has been changed. {AGAIN}", field=name, path=file)
    return told


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sum(told: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
