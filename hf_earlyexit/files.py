"""Folders and files that are replaced whole or not at all, and what is read back from them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import CheckpointError
from .folder_swap import exchanged, list_files, sync
from .values import MOST_BYTES, parse_json

if sys.platform != "win32":
    import fcntl

CONFIG = Path("config.json")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def replaced_folder(folder: str | PathLike[str], needs: int = 0) -> Iterator[Path]:
    """An empty folder to write into, that takes the place of `folder` when the block ends without an error.

    Other files in `folder` stay, except weights that would be read in place of the new ones. Modes of new files follow the
    umask. After an error `folder` is as it was, and nothing is left beside it. Old and new folder swap in one step, so that
    a kill at any instant leaves one of them whole. Where that cannot be done (Windows, network file systems, a mount point,
    the folder that one works in, more than 1,000 other files), files move one by one, weights near the end and config.json
    last. What a kill leaves beside the folder is removed when it is written again.

    Args:
        folder: made if it is not there.
        needs: bytes that will be written, for the message of an error.

    Raises:
        CheckpointError: if `folder` is a file, or cannot be written.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a folder, or a name that is free.", path=target)
    _sweep(target)
    stage = _beside(target)
    try:
        new = stage / "new"
        new.mkdir(parents=True)
        with _claimed(stage):
            yield new
            _make_durable(new)
            written = list_files(new)
            if not target.is_dir():
                new.rename(target)
                sync(target.parent)
            elif not exchanged(target, new, {*written, *_outdated(target, written)}):
                _move_into(target, new, stage / "former", written)
    except (OSError, SafetensorError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and not str(error.path).startswith(str(stage)):
            raise
        raise _not_written(target, error.__cause__ or error, needs) from error
    finally:
        _remove(stage)


def write_file(path: str | PathLike[str], data: bytes) -> None:
    """Replace one file whole; after an error or a kill it is as it was, or new.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = Path(path).resolve()
    _sweep(target)
    temporary = _beside(target)
    try:
        with open(temporary, "wb") as file, _claimed(temporary):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(target, error, len(data)) from error


def write_tensors(path: str | PathLike[str], form: str, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace a safetensors file whole; `values` are JSON values beside the tensors, and a sum ties all of it together.

    Raises:
        CheckpointError: if it cannot be written.
    """
    text = json.dumps(values, allow_nan=False)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file(path, save(tensors, metadata={"format": form, "values": text, "sha256": _tensor_sum(text, tensors)}))


def read_tensors(path: str | PathLike[str], form: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values and tensors that `write_tensors` wrote.

    Args:
        path: the file.
        form: what it must say it is.

    Raises:
        ValueError: if it says something else, or was changed since it was written.
        OSError, SafetensorError: if it cannot be read.
    """
    with safe_open(path, framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != form:
            raise ValueError(f"its format is {meta.get('format')!r}, expected {form!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    values = parse_json(meta.get("values", ""), path)
    if meta.get("sha256") != _tensor_sum(meta["values"], tensors):
        raise ValueError("it was changed since it was written")
    return values, tensors


def write_json(path: str | PathLike[str], values: dict[str, Any], allow_nan: bool = False) -> None:
    """As `write_file`, for a JSON object; the folder is made if it is not there.

    Raises:
        CheckpointError: if it cannot be written.
        ValueError: for a number that JSON does not know, such as nan, unless `allow_nan`; only Python reads these again.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(target, error, 0) from error
    write_file(target, (json.dumps(values, indent=1, allow_nan=allow_nan) + "\n").encode())


def read_json(path: str | PathLike[str], finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file; see `parse_json`.

    Raises:
        CheckpointError: if the file cannot be read, or holds anything else.
    """
    try:
        size = Path(path).stat().st_size
        data = b"" if size > MOST_BYTES else Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}).", path=path) from error
    if size > MOST_BYTES:
        raise CheckpointError(f"{path} has {size:,} bytes; expected at most {MOST_BYTES:,}.", path=path)
    return parse_json(data, path, finite)


def inside(folder: Path, name: str) -> Path:
    """The place of the file `name` in `folder`.

    Raises:
        CheckpointError: if the name, or a link on its way, leads out of the folder.
    """
    place = folder / name
    if folder.resolve() not in place.resolve().parents:
        raise CheckpointError(f"The file name {name!r} leads out of {folder}; expected one inside.", field=name, path=folder)
    return place


def _tensor_sum(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _beside(target: Path) -> Path:
    """A name on the same file system; uploads by `Trainer` skip names that begin with an underscore."""
    shut_in = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    return (target if shut_in else target.parent) / f"_{target.name}.saving-{secrets.token_hex(4)}"


def _sweep(target: Path) -> None:
    """Remove what a killed save left; the lock of one that is still running says so."""
    for place in (target.parent, target):
        for left in place.glob(f"_{glob.escape(target.name)}.saving-*"):
            with suppress(OSError), _claimed(left) as free:
                if free:
                    _remove(left)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Hold a lock that ends with the process; yields whether it is held. Not every file system has them."""
    if sys.platform == "win32":
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _make_durable(folder: Path) -> None:
    mode = folder.stat().st_mode & 0o666  # a folder just made shows the umask
    for name in list_files(folder):
        (folder / name).chmod(mode)
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
    for home, _, _ in os.walk(folder):
        sync(Path(home))


def _outdated(target: Path, written: list[Path]) -> list[Path]:
    """Weights that would be read in place of those just written."""
    if not any(WEIGHTS.fullmatch(str(name)) for name in written):
        return []
    weights = [Path(path.name) for path in target.iterdir() if WEIGHTS.fullmatch(path.name)]
    return [name for name in weights if name not in written]


def _move_into(target: Path, new: Path, former: Path, written: list[Path]) -> None:
    weights = [name for name in written if WEIGHTS.fullmatch(str(name))]
    stale = _outdated(target, written)
    config = [name for name in written if name == CONFIG]
    others = [name for name in written if name not in weights and name != CONFIG]
    order = [*others, *weights, *stale, *config]
    for name in order:
        _keep(target / name, former / name)
    try:
        for name in order:
            if name in stale:
                (target / name).unlink()
            else:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (new / name).replace(target / name)
        sync(target)
    except BaseException:
        for name in order:
            if (former / name).exists():
                (former / name).replace(target / name)
            elif not (new / name).exists():
                (target / name).unlink(missing_ok=True)
        raise


def _keep(place: Path, copy: Path) -> None:
    if not place.is_file():
        return
    copy.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(place, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(place, copy)


def _remove(left: Path) -> None:
    """Whatever it is, with folders in it that may not be written."""
    for home, _, _ in os.walk(left):
        with suppress(OSError):
            Path(home).chmod(0o700)
    shutil.rmtree(left, ignore_errors=True)
    with suppress(OSError):
        left.unlink()


def _not_written(target: Path, error: BaseException, needs: int) -> CheckpointError:
    home = next(parent for parent in (target, *target.parents) if parent.is_dir())
    wanted = f"It takes about {needs:,} bytes; " if needs else ""
    return CheckpointError(
        f"{target} could not be written ({error}); what was there before is untouched. "
        f"{wanted}{shutil.disk_usage(home).free:,} are free there. Make room, or choose another place.",
        path=target,
    )
