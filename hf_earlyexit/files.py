"""Folders and files that are replaced whole or not at all, and JSON that is read with care."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import CheckpointError

CONFIG = Path("config.json")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def replaced_folder(folder: str | PathLike[str], needs: int = 0) -> Iterator[Path]:
    """An empty folder to write into, whose files move to `folder` when the block ends without an error.

    Weights move near the end, right before config.json. Other files in `folder` stay, except weights that would be read in
    place of the new ones. File modes follow the umask. After an error `folder` is as it was, and nothing is left beside it.

    Args:
        folder: made if it is not there.
        needs: bytes that will be written, for the message of an error.

    Raises:
        CheckpointError: if `folder` is a file, or cannot be written.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; expected a folder, or a name that is free.", path=target)
    stage = _beside(target)
    try:
        new = stage / "new"
        new.mkdir(parents=True)
        yield new
        _make_durable(new)
        if target.is_dir():
            _move_into(target, new, stage / "former")
        else:
            new.rename(target)
    except (OSError, SafetensorError, CheckpointError) as error:
        if isinstance(error, CheckpointError) and not str(error.path).startswith(str(stage)):
            raise
        raise _not_written(target, error.__cause__ or error, needs) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_file(path: str | PathLike[str], data: bytes) -> None:
    """Replace one file whole; after an error it is as it was.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = Path(path).resolve()
    temporary = _beside(target)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _not_written(target, error, len(data)) from error


def write_json(path: str | PathLike[str], values: dict[str, Any]) -> None:
    """As `write_file`, for a JSON object; the folder is made if it is not there.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(target, error, 0) from error
    write_file(target, json.dumps(values, indent=1).encode())


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: if the file holds anything else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON in UTF-8 ({error}); make or download it again.", path=path) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a JSON {type(values).__name__}; expected an object.", path=path)
    return values


def inside(folder: Path, name: str) -> Path:
    """The place of the file `name` in `folder`.

    Raises:
        CheckpointError: if the name, or a link on its way, leads out of the folder.
    """
    place = folder / name
    if folder.resolve() not in place.resolve().parents:
        raise CheckpointError(f"The file name {name!r} leads out of {folder}; expected one inside.", field=name, path=folder)
    return place


def _beside(target: Path) -> Path:
    """A name on the same file system; uploads by `Trainer` skip names that begin with an underscore."""
    shut_in = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    return (target if shut_in else target.parent) / f"_{target.name}.saving-{secrets.token_hex(4)}"


def _make_durable(folder: Path) -> None:
    mode = folder.stat().st_mode & 0o666  # a folder just made shows the umask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def _move_into(target: Path, new: Path, former: Path) -> None:
    names = sorted(path.relative_to(new) for path in new.rglob("*") if path.is_file())
    weights = [name for name in names if WEIGHTS.fullmatch(str(name))]
    stale = [Path(path.name) for path in target.iterdir() if WEIGHTS.fullmatch(path.name)] if weights else []
    stale = [name for name in stale if name not in weights]
    config = [name for name in names if name == CONFIG]
    others = [name for name in names if name not in weights and name != CONFIG]
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


def _not_written(target: Path, error: BaseException, needs: int) -> CheckpointError:
    home = next(parent for parent in (target, *target.parents) if parent.is_dir())
    wanted = f"It takes about {needs:,} bytes; " if needs else ""
    return CheckpointError(
        f"{target} could not be written ({error}); what was there before is untouched. "
        f"{wanted}{shutil.disk_usage(home).free:,} are free there. Make room, or choose another place.",
        path=target,
    )
