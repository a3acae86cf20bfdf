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
from ..values import json_sum, shown

MANIFEST, ONE_FILE = "manifest.json", "model.onnx"
FORMAT = "hf_earlyexit.onnx/1"
PACKAGES = ("hf_earlyexit", "onnx", "onnxruntime", "torch", "transformers")
NEEDED = {"config": dict, "dtype": str, "static": bool, "fingerprint": str, "files": dict}
DTYPES = ("float32", "int8")
AGAIN = "Export the model again, or copy the folder again."


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    files = {path.relative_to(folder).as_posix(): _sum(path) for path in paths}
    versions = {name: version(name) for name in PACKAGES}
    manifest = {"format": FORMAT, **values, "versions": versions, "files": files}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "sha256": json_sum(manifest)}, indent=1, allow_nan=False) + "\n")


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
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}; expected {FORMAT!r}. {AGAIN}", path=path)
    digest = manifest.pop("sha256", None)
    if digest != json_sum(manifest):
        raise CheckpointError(f"{path} has been changed since it was written. {AGAIN}", field="sha256", path=path)
    for name, kind in NEEDED.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(
                f"{name} in {path} is {shown(manifest.get(name))}; expected a {kind.__name__}. {AGAIN}",
                field=name,
                path=path,
            )
    if manifest["dtype"] not in DTYPES:
        raise CheckpointError(
            f"dtype in {path} is {manifest['dtype']!r}; expected {' or '.join(DTYPES)}.", field="dtype", path=path
        )
    for name, expected in manifest["files"].items():
        file = inside(folder, name)
        if not file.is_file():
            raise CheckpointError(f"{file} is missing. {AGAIN}", field=name, path=file)
        if _sum(file) != expected:
            raise CheckpointError(f"{file} is damaged or has been changed. {AGAIN}", field=name, path=file)
    return manifest


def _sum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
