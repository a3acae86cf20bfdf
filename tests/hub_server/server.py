"""The server itself: who may do what, what goes wrong on purpose, and the talking over HTTP."""

import hashlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from .endpoints import ROUTES, Request, Response, refusal, repo_key
from .store import FAULTS, Commit, HubError, Pointer, Repo, xet_pointers

LFS_SUFFIXES = (".arrow", ".bin", ".gz", ".h5", ".npz", ".onnx", ".parquet", ".pt", ".pth", ".safetensors", ".zip")
LFS_THRESHOLD = 10 * 1024 * 1024


class Account(NamedTuple):
    """Whom a token belongs to, and whether it may write (`role` is ``"write"`` or ``"read"``)."""

    user: str
    role: str


@dataclass
class Fault:
    """A switch set by `HubServer.fail`."""

    kind: str
    times: int
    match: str
    seconds: float


class HubServer:
    """The server; a context manager.

    Args:
        user: Owner of `token`, which may write, and of `read_token`, which may not. `stranger_token` may write, but
            belongs to someone else.
        lfs_threshold: Size in bytes from which any file is large; the suffixes in `LFS_SUFFIXES` always are.
        xet_dir: Folder for large files in Xet mode. Without it the client is told to use LFS.

    Attributes:
        repos: Every repository, by ``user/name``, or ``datasets/user/name``.
        requests: Method and path of every request, in order of arrival.
        lfs_objects: Bytes of every large file received, by sha256.
        crashes: Tracebacks of errors in this server itself. Leaving the context raises if there are any.
    """

    def __init__(self, user: str = "tester", lfs_threshold: int = LFS_THRESHOLD, xet_dir: Path | None = None) -> None:
        self.user, self.lfs_threshold, self.xet_dir = user, lfs_threshold, xet_dir
        self.token, self.read_token, self.stranger_token = "hf_write", "hf_read", "hf_stranger"
        self.accounts = {
            self.token: Account(user, "write"),
            self.read_token: Account(user, "read"),
            self.stranger_token: Account("stranger", "write"),
        }
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []
        self.lfs_objects: dict[str, bytes] = {}
        self.crashes: list[str] = []
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._http = Listener(("127.0.0.1", 0), Handler)
        self._http.hub = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        if self.crashes and kind is None:
            raise RuntimeError("the stand-in Hub itself failed:\n" + "\n".join(self.crashes))

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The whole environment for a child process that is to use this server.

        Args:
            home: The folder for the client's caches; a fresh one means that nothing is cached yet.
            token: The token the child uses; the writing one by default, ``""`` for none.
        """
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet_dir else "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        return inherited | settings

    def add_repo(self, key: str, files: Mapping[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository without a client; like on the real Hub, the first commit names the large files."""
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": attributes.encode()} | dict(files or {})
        large = {
            path: Pointer(hashlib.sha256(data).hexdigest(), len(data))
            for path, data in files.items()
            if self.is_large(path, len(data))
        }
        first = Commit("initial commit", files, large, author=key.split("/")[-2])
        self.repos[key] = Repo(key, private, [first], {"refs/heads/main": first.sha})
        return self.repos[key]

    def is_large(self, path: str, size: int) -> bool:
        """Whether a file is kept apart from git."""
        return path.endswith(LFS_SUFFIXES) or size >= self.lfs_threshold

    def fail(self, kind: str, times: int = 1, match: str = "", seconds: float = 1.0) -> None:
        """Let the next requests go wrong.

        Args:
            kind: A status of `FAULTS`; ``"slow"`` to wait before the answer; ``"cut"`` to do what was asked, then
                close the connection halfway through the body of the answer (before it, if it has none).
            times: For how many requests.
            match: Regular expression searched in ``"METHOD /path?query"``; other requests are left alone.
            seconds: How long ``"slow"`` waits.
        """
        if kind not in {*FAULTS, "slow", "cut"}:
            raise ValueError(f"no fault named {kind!r}; choose one of {', '.join([*FAULTS, 'slow', 'cut'])}")
        with self._lock:
            self._faults.append(Fault(kind, times, match, seconds))

    def count(self, match: str) -> int:
        """How many requests so far match, as in `fail`."""
        return sum(bool(re.search(match, f"{method} {path}")) for method, path in self.requests)

    def receive(self, request: Request) -> tuple[Response, Fault | None]:
        """Log a request and answer it; also says which fault, if any, is still to be played on the wire."""
        with self._lock:
            self.requests.append((request.method, request.target))
            fault = self._next_fault(f"{request.method} {request.target}")
            if fault and fault.kind in FAULTS:
                return refusal(HubError(*FAULTS[fault.kind])), None
            try:
                return self._dispatch(request), fault
            except HubError as error:
                return refusal(error), fault
            except Exception:
                self.crashes.append(traceback.format_exc())
                return refusal(HubError(500, "The stand-in itself failed; see its crashes")), fault

    def _next_fault(self, line: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and re.search(fault.match, line):
                fault.times -= 1
                return fault
        return None

    def _dispatch(self, request: Request) -> Response:
        for route in ROUTES:
            found = route.pattern.fullmatch(request.path) if request.method in route.methods else None
            if found:
                names: dict[str, Any] = {one: unquote(text) for one, text in found.groupdict().items() if text}
                if "name" in names:
                    key = repo_key(names.pop("kind", None), names.pop("name"))
                    names["repo"] = self.open_repo(request, key, route.writes)
                return route.answer(self, request, **names)
        raise HubError(404, f"This stand-in has no {request.method} {request.path}")

    def large_file(self, oid: str) -> tuple[Pointer, bytes]:
        """What a commit stores for a large file that was sent before."""
        if (data := self.lfs_objects.get(oid)) is not None:
            return Pointer(oid, len(data)), data
        if self.xet_dir and (pointer := xet_pointers(self.xet_dir).get(oid)):
            return pointer, pointer.text
        raise HubError(400, f"The large file {oid} was never sent")

    def account(self, request: Request) -> Account | None:
        """Who is asking; an unknown token is refused even where none is needed."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.accounts:
            raise HubError(*FAULTS["401"])
        return self.accounts.get(token)

    def writer(self, request: Request, owner: str | None) -> Account:
        """Who is asking, if they may write what `owner` owns (``None``: a proposal, which anyone may make)."""
        account = self.account(request)
        if account is None:
            raise HubError(401, "Log in to write")
        if account.role != "write":
            raise HubError(403, "A token with the write role is needed")
        if owner not in (None, account.user):
            raise HubError(403, f"{account.user} may not write what belongs to {owner}")
        return account

    def open_repo(self, request: Request, key: str, writes: bool) -> Repo:
        """The repository `key`, if whoever asks may see it and, for `writes`, change it."""
        account, owner, repo = self.account(request), key.split("/")[-2:][0], self.repos.get(key)
        if repo is None or (repo.private and (account is None or account.user != owner)):
            raise HubError(404 if account else 401, f"No repository {key} for you", "RepoNotFound")
        if writes:
            self.writer(request, None if request.flag("create_pr") else owner)
        return repo


class Listener(ThreadingHTTPServer):
    """The listening socket; knows the `HubServer` it works for."""

    hub: HubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet about clients that hang up; anything else is a fault of this server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.hub.crashes.append(traceback.format_exc())


class Handler(BaseHTTPRequestHandler):
    """Turns bytes into a `Request` and a `Response` into bytes."""

    server: Listener
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def answer(self) -> None:
        """Serve one request, whatever its method."""
        request = Request(self.command, self.path, self.headers, self.read_body())
        response, fault = self.server.hub.receive(request)
        if fault and fault.kind == "slow":
            time.sleep(fault.seconds)
        body = b"" if self.command == "HEAD" else response.body
        if fault and fault.kind == "cut":
            self.close_connection = True
            if not body:
                return
            body = body[: len(body) // 2]
        self.send_response(response.status)
        for name, value in (response.headers | {"Content-Length": str(len(response.body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def read_body(self) -> bytes:
        """The body, of a known length or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *args: Any) -> None:
        """Print nothing; `HubServer.requests` is the log."""


for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
    setattr(Handler, f"do_{method}", Handler.answer)
