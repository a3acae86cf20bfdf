"""What the Hub keeps: repositories, their commits and the large files beside them."""

import hashlib
import itertools
import secrets
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = {
    "401": (401, "Invalid credentials in Authorization header"),
    "403": (403, "This token may not do that"),
    "412": (412, "The branch has moved on since the parent commit"),
    "429": (429, "Too many requests"),
    "500": (500, "The server stumbled, on purpose"),
}


class HubError(Exception):
    """An answer other than success; `code` becomes the ``X-Error-Code`` header that the client turns into a class."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, dict(headers or {})


class Pointer(NamedTuple):
    """What git keeps of a large file."""

    sha256: str
    size: int
    xet_hash: str | None = None

    @property
    def text(self) -> bytes:
        """The pointer file, as git-lfs writes it."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()


@dataclass(frozen=True)
class Commit:
    """One state of a repository.

    `files` holds the bytes of every file, large ones included; `lfs` names the large ones. A large file which came
    through Xet is the exception: only its pointer is known here.
    """

    message: str
    files: dict[str, bytes] = field(default_factory=dict)
    lfs: dict[str, Pointer] = field(default_factory=dict)
    parent: str | None = None
    description: str = ""
    author: str = ""
    # Never derived from the content: the client caches listings by this name for ever.
    sha: str = field(default_factory=lambda: secrets.token_hex(20))
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()))

    def under(self, path: str) -> dict[str, bytes]:
        """The file at `path`, or the files below it if it is a folder; ``""`` is the root."""
        return {name: data for name, data in self.files.items() if not path or f"{name}/".startswith(f"{path}/")}

    def oid(self, path: str) -> str:
        """The git name of a file."""
        return git_hash(self.lfs[path].text if path in self.lfs else self.files[path])

    def etag(self, path: str) -> str:
        """What tells the client whether its copy is current: sha256 of a large file, git name of another."""
        return self.lfs[path].sha256 if path in self.lfs else self.oid(path)


@dataclass
class Repo:
    """A model or data set repository: its commits, oldest first, and the refs that point to them."""

    name: str
    private: bool
    commits: list[Commit]
    refs: dict[str, str]

    @property
    def branches(self) -> dict[str, str]:
        """Commit of each branch."""
        return self.named("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        """Commit of each tag."""
        return self.named("refs/tags/")

    @property
    def pull_requests(self) -> dict[str, str]:
        """Commit of each pull request, by number."""
        return self.named("refs/pr/")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path to bytes at a revision."""
        return self.at(revision).files

    def named(self, prefix: str) -> dict[str, str]:
        """The refs below `prefix`, without it."""
        return {ref.removeprefix(prefix): sha for ref, sha in self.refs.items() if ref.startswith(prefix)}

    def ref(self, revision: str) -> str:
        """The full name of the branch, tag or pull request that `revision` means; ``""`` if there is none."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), "")

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or commit id stands for."""
        sha = self.refs.get(self.ref(revision), revision)
        for commit in self.commits:
            if commit.sha == sha:
                return commit
        raise HubError(404, f"No revision {revision}", "RevisionNotFound")

    def history(self, commit: Commit) -> Iterator[Commit]:
        """`commit` and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.at(commit.parent)
            yield commit

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The newest commit, up to `commit`, that changed `path`."""
        history = list(self.history(commit))
        for newer, older in itertools.pairwise(history):
            if older.under(path) != newer.under(path):
                return newer
        return history[-1]

    def entry(self, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
        """`path` as the tree and paths-info endpoints describe it."""
        if path not in commit.files:
            listing = "".join(f"{name} {commit.oid(name)}\n" for name in sorted(commit.under(path)))
            entry: dict[str, Any] = {"type": "directory", "oid": git_hash(listing.encode()), "size": 0, "path": path}
        else:
            entry = {"type": "file", "oid": commit.oid(path), "size": len(commit.files[path]), "path": path}
        if pointer := commit.lfs.get(path):
            entry["size"] = pointer.size
            entry["lfs"] = {"oid": pointer.sha256, "size": pointer.size, "pointerSize": len(pointer.text)}
            entry |= {"xetHash": pointer.xet_hash} if pointer.xet_hash else {}
        if expand:
            last = self.last_change(commit, path)
            entry["lastCommit"] = {"id": last.sha, "title": last.message, "date": last.date}
        return entry


def git_hash(data: bytes) -> str:
    """The name git gives to a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def xet_pointers(folder: Path) -> dict[str, Pointer]:
    """Every file that the Xet shards below `folder` describe, by sha256.

    A shard is a row of 48-byte records. After a header there is one for each file (name, flags, number of segments),
    followed by its segments (among others their sizes), as many checks if bit 31 of the flags is set, and the sha256
    of the file if bit 30 is set.
    """
    found, record = {}, 48
    for shard in folder.rglob("*.mdb"):
        data, place = shard.read_bytes(), record
        while data[place : place + 32] != b"\xff" * 32:
            name, flags, segments = struct.unpack_from("<32sII", data, place)
            size = sum(struct.unpack_from("<I", data, place + record * (1 + one) + 36)[0] for one in range(segments))
            place += record * (1 + segments * (2 if flags >> 31 else 1))
            if flags >> 30 & 1:
                sha256 = words(data[place : place + 32])
                found[sha256] = Pointer(sha256, size, words(name))
                place += record
    return found


def words(raw: bytes) -> str:
    """32 bytes in the hexadecimal form Xet uses: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
