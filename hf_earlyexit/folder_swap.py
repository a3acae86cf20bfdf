"""A new folder takes the place of a former one in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from pathlib import Path
from typing import Any

SWAP = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
AT_FDCWD = -100
MOST_CARRIED = 1000


def exchanged(target: Path, new: Path, gone: set[Path]) -> bool:
    """Whether `new`, with all of `target` that is not `gone`, took its place in one step; the two have swapped then.

    Raises:
        OSError: after a fault that came later; they have swapped back then.
    """
    try:
        works_here = target in (Path.cwd(), *Path.cwd().parents)
        if works_here or target.is_mount() or not os.access(target, os.W_OK) or not _carry_over(target, new, gone):
            return False
        swap(new, target)
    except OSError:  # no such call, another file system below, no hard links, a foreign owner
        return False
    try:
        sync(target.parent)
        _follow(former=new, target=target, gone=gone)
    except BaseException:
        swap(new, target)
        raise
    return True


def swap(one: Path, other: Path) -> None:
    """Exchange two paths on one file system; at every instant both names lead to a whole folder.

    Raises:
        OSError: where the system or the file system cannot do it; nothing has changed then.
    """
    library: Any = None if sys.platform == "win32" else ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):
        failed = library.renameat2(AT_FDCWD, first, AT_FDCWD, second, ctypes.c_uint(SWAP))
    elif hasattr(library, "renamex_np"):
        failed = library.renamex_np(first, second, ctypes.c_uint(SWAP))
    else:
        raise OSError(errno.ENOSYS, "this system cannot swap two folders")
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(one), None, str(other))


def list_files(folder: Path) -> list[Path]:
    """Names of all in a folder and its subfolders that is no folder itself; links are not followed."""
    return sorted(
        (Path(home) / name).relative_to(folder)
        for home, folders, files in os.walk(folder)
        for name in [*files, *(name for name in folders if (Path(home) / name).is_symlink())]
    )


def sync(folder: Path) -> None:
    """Make names in a folder durable, where a system can do that."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _carry_over(target: Path, new: Path, gone: set[Path]) -> bool:
    """Link what stays of `target` into `new`; `False` if that is too much, or on other file systems."""
    stay = [name for name in list_files(target) if name not in gone]
    homes = [Path(home).relative_to(target) for home, _, _ in os.walk(target)]
    if len(stay) + len(homes) > MOST_CARRIED or len({(target / home).stat().st_dev for home in homes}) > 1:
        return False
    for home in homes:
        (new / home).mkdir(exist_ok=True)
    for name in stay:
        os.link(target / name, new / name, follow_symlinks=False)
    for home in reversed(homes):
        former = (target / home).stat()
        os.chown(new / home, former.st_uid, former.st_gid)
        shutil.copystat(target / home, new / home)
        sync(new / home)
    return True


def _follow(former: Path, target: Path, gone: set[Path]) -> None:
    """Link what other processes have put into the former folder in the meantime."""
    for name in list_files(former):
        place = target / name
        known = os.path.lexists(place) and place.lstat().st_ino == (former / name).lstat().st_ino
        if name not in gone and not known:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            os.link(former / name, place, follow_symlinks=False)
