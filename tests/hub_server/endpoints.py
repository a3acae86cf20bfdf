"""The requests the client makes, one function for each."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from .card import front_matter
from .store import FAULTS, Commit, HubError, Pointer, Repo

if TYPE_CHECKING:
    from .server import HubServer


@dataclass(frozen=True)
class Request:
    """What the client sent."""

    method: str
    target: str
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        """The path, still percent-encoded: an encoded slash belongs to a name."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, list[str]]:
        """The parameters behind the question mark."""
        return parse_qs(urlsplit(self.target).query)

    def flag(self, name: str) -> bool:
        """Whether a parameter says yes."""
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class Response:
    """What the server answers; a `body` that is not bytes is sent as JSON."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.body, bytes):
            self.body = json.dumps(self.body).encode()
            self.headers.setdefault("Content-Type", "application/json")


Endpoint = Callable[..., Response]


class Route(NamedTuple):
    """Which function answers which requests."""

    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    writes: bool
    answer: Endpoint


ROUTES: list[Route] = []
API = "/api/(?P<kind>models|datasets)/(?P<name>[^/]+(?:/[^/]+)?)"
FILES = "/(?:(?P<kind>datasets)/)?(?P<name>[^/]+(?:/[^/]+)?)"
REVISION = "(?P<revision>[^/]+)"


def route(methods: str, pattern: str, writes: bool = False) -> Callable[[Endpoint], Endpoint]:
    """Register a function for requests; named groups become its arguments, ``kind`` and ``name`` a `Repo`."""

    def register(answer: Endpoint) -> Endpoint:
        ROUTES.append(Route(tuple(methods.split()), re.compile(pattern), writes, answer))
        return answer

    return register


@route("GET", "/api/whoami-v2")
def whoami(hub: HubServer, request: Request) -> Response:
    """Tell the owner of the token."""
    account = hub.account(request)
    if account is None:
        raise HubError(401, "Log in first")
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": account.role}}
    return Response({"type": "user", "name": account.user, "fullname": account.user, "orgs": [], "auth": auth})


def named_repo(hub: HubServer, request: Request) -> str:
    """Key of the repository that the body names; without an owner it belongs to whoever asks."""
    wanted = request.json()
    owner = wanted.get("organization") or hub.writer(request, None).user
    return repo_key(wanted.get("type"), f"{owner}/{wanted['name']}")


@route("POST", "/api/repos/create")
def create_repo(hub: HubServer, request: Request) -> Response:
    """Make a repository; like the real one, it starts with a commit that names the large files."""
    key, private = named_repo(hub, request), request.json().get("visibility") == "private"
    hub.writer(request, key.split("/")[-2])
    answer = {"name": key, "url": f"{hub.url}/{key}"}
    if key in hub.repos:
        return Response(answer | {"error": f"{key} exists already"}, 409)
    hub.add_repo(key, private=private)
    return Response(answer)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubServer, request: Request) -> Response:
    """Drop a repository."""
    key = named_repo(hub, request)
    hub.open_repo(request, key, writes=True)
    del hub.repos[key]
    return Response()


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubServer, request: Request) -> Response:
    """Check the front matter of a card."""
    content = request.json()["content"]
    errors = [{"message": error} for error in front_matter(content)[1]]
    warnings = [] if content.startswith("---") else [{"message": "the card has no metadata"}]
    return Response({"errors": errors, "warnings": warnings}, 400 if errors else 200)


@route("POST", f"{API}/preupload/{REVISION}", writes=True)
def preupload(hub: HubServer, request: Request, repo: Repo, revision: str) -> Response:
    """Tell for each file how to send it, and what is there now: the client leaves out what has not changed."""
    commit, answer = repo.at(revision), []
    for file in request.json()["files"]:
        large = hub.is_large(file["path"], file["size"])
        same_kind = file["path"] in commit.files and (file["path"] in commit.lfs) == large
        known = {"path": file["path"]} | ({"oid": commit.etag(file["path"])} if same_kind else {})
        answer.append(known | {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
    return Response({"files": answer})


@route("POST", rf"{FILES}\.git/info/lfs/objects/batch")
def lfs_batch(hub: HubServer, request: Request, repo: Repo) -> Response:
    """Tell where to send large files; those already here need no sending."""
    hub.writer(request, None)
    answer = []
    for wanted in request.json()["objects"]:
        upload, verify = {"href": f"{hub.url}/lfs/{wanted['oid']}"}, {"href": f"{hub.url}/lfs-verify"}
        actions = {} if wanted["oid"] in hub.lfs_objects else {"actions": {"upload": upload, "verify": verify}}
        answer.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
    return Response({"transfer": "basic", "objects": answer})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def lfs_put(hub: HubServer, request: Request, oid: str) -> Response:
    """Receive a large file; it must be what was announced."""
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, f"The bytes received do not have the sha256 {oid}")
    hub.lfs_objects[oid] = request.body
    return Response()


@route("POST", "/lfs-verify")
def lfs_verify(hub: HubServer, request: Request) -> Response:
    """Confirm that a large file has arrived."""
    hub.writer(request, None)
    wanted = request.json()
    if len(hub.lfs_objects.get(wanted["oid"], b"")) != wanted["size"]:
        raise HubError(404, f"No large file {wanted['oid']} of {wanted['size']} bytes")
    return Response()


@route("GET", f"{API}/xet-(?P<action>read|write)-token/{REVISION}")
def xet_token(hub: HubServer, request: Request, repo: Repo, action: str, revision: str) -> Response:
    """Tell where the Xet store is: a local folder."""
    if hub.xet_dir is None:
        raise HubError(404, "This server was started without a folder for Xet")
    if action == "write":
        hub.writer(request, None)
    place, expiry = f"local://{hub.xet_dir}", int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": place, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expiry)}
    return Response({"casUrl": place, "accessToken": "xet", "exp": expiry}, headers=headers)


def apply_change(hub: HubServer, files: dict[str, bytes], lfs: dict[str, Pointer], kind: str, value: Any) -> None:
    """Apply one line of a commit, an addition or a removal, to the files of the next commit."""
    path = value["path"]
    match kind:
        case "file":
            lfs.pop(path, None)
            files[path] = base64.b64decode(value["content"])
        case "lfsFile":
            lfs[path], files[path] = hub.large_file(value["oid"])
        case "deletedFile" | "deletedFolder":
            folder = path.rstrip("/") + "/"
            doomed = [name for name in files if name == path or (kind == "deletedFolder" and name.startswith(folder))]
            if not doomed:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            for name in doomed:
                del files[name]
                lfs.pop(name, None)
        case _:
            raise HubError(400, f"No change is named {kind}")


@route("POST", f"{API}/commit/{REVISION}", writes=True)
def make_commit(hub: HubServer, request: Request, repo: Repo, revision: str) -> Response:
    """Apply changes, all of them or none, to a branch or pull request, or propose them as a new pull request."""
    (_, header), *changes = [(line["key"], line["value"]) for line in map(json.loads, request.body.splitlines())]
    parent, ref = header.get("parentCommit"), repo.ref(revision)
    if not ref.startswith(("refs/heads/", "refs/pr/")):
        raise HubError(404, f"No branch {revision}", "RevisionNotFound")
    if request.flag("create_pr"):
        ref = f"refs/pr/{len(repo.pull_requests) + 1}"
    elif parent and not repo.refs[ref].startswith(parent):
        raise HubError(*FAULTS["412"])
    base = repo.at(parent or revision) if request.flag("create_pr") else repo.at(revision)
    files, lfs = dict(base.files), dict(base.lfs)
    for kind, value in changes:
        apply_change(hub, files, lfs, kind, value)
    author = hub.writer(request, None).user
    new = Commit(header["summary"], files, lfs, base.sha, header.get("description", ""), author)
    repo.commits.append(new)
    repo.refs[ref] = new.sha
    answer = {"success": True, "commitOid": new.sha, "commitUrl": f"{hub.url}/{repo.name}/commit/{new.sha}"}
    if request.flag("create_pr"):
        answer["pullRequestUrl"] = f"{hub.url}/{repo.name}/discussions/{ref.rpartition('/')[2]}"
    return Response(answer)


@route("POST", f"{API}/branch/(?P<branch>[^/]+)", writes=True)
def create_branch(hub: HubServer, request: Request, repo: Repo, branch: str) -> Response:
    """Start a branch."""
    return add_ref(repo, f"refs/heads/{branch}", request.json().get("startingPoint") or "main")


@route("POST", f"{API}/tag/{REVISION}", writes=True)
def create_tag(hub: HubServer, request: Request, repo: Repo, revision: str) -> Response:
    """Tag a revision."""
    return add_ref(repo, f"refs/tags/{request.json()['tag']}", revision)


@route("DELETE", f"{API}/(?P<what>branch|tag)/(?P<ref>[^/]+)", writes=True)
def delete_ref(hub: HubServer, request: Request, repo: Repo, what: str, ref: str) -> Response:
    """Drop a branch or a tag."""
    if repo.refs.pop(("refs/heads/" if what == "branch" else "refs/tags/") + ref, None) is None:
        raise HubError(404, f"No {what} {ref}", "RevisionNotFound")
    return Response()


@route("GET", f"{API}/refs")
def list_refs(hub: HubServer, request: Request, repo: Repo) -> Response:
    """List branches, tags and, if asked, pull requests."""

    def listed(prefix: str) -> list[dict[str, str]]:
        names = repo.named(prefix)
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]

    pulls = {"pullRequests": listed("refs/pr/")} if request.flag("include_prs") else {}
    return Response({"branches": listed("refs/heads/"), "tags": listed("refs/tags/"), "converts": []} | pulls)


@route("GET", f"{API}/commits/{REVISION}")
def list_commits(hub: HubServer, request: Request, repo: Repo, revision: str) -> Response:
    """List the commits of a revision, newest first."""
    answer = []
    for one in repo.history(repo.at(revision)):
        texts = {"title": one.message, "message": one.description}
        answer.append({"id": one.sha, "date": one.date, "authors": [{"user": one.author}]} | texts)
    return Response(answer)


@route("GET", f"{API}/tree/{REVISION}(?:/(?P<path>.+))?")
def list_tree(hub: HubServer, request: Request, repo: Repo, revision: str, path: str = "") -> Response:
    """List a folder, or everything below it."""
    commit, base = repo.at(revision), PurePosixPath(path)
    files = [PurePosixPath(name) for name in commit.under(path) if name != path]
    if path and not files:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    folders = {folder for file in files for folder in file.parents if folder.is_relative_to(base) and folder != base}
    shown = [found for found in {*files, *folders} if request.flag("recursive") or found.parent == base]
    return Response([repo.entry(commit, str(found), request.flag("expand")) for found in sorted(shown)])


@route("POST", f"{API}/paths-info/{REVISION}")
def paths_info(hub: HubServer, request: Request, repo: Repo, revision: str) -> Response:
    """Describe some files and folders; unknown ones are left out."""
    commit, form = repo.at(revision), parse_qs(request.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    return Response([repo.entry(commit, path, expand) for path in form.get("paths", []) if commit.under(path)])


@route("GET", f"{API}(?:/revision/{REVISION})?")
def repo_info(hub: HubServer, request: Request, repo: Repo, revision: str = "main") -> Response:
    """Describe a repository; task, library and tags come from its card alone."""
    commit = repo.at(revision)
    card, _ = front_matter(commit.files.get("README.md", b"").decode())
    known = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    if request.flag("blobs"):
        siblings = [described(repo.entry(commit, path, expand=False)) for path in sorted(commit.files)]
    plain = {"id": repo.name.removeprefix("datasets/"), "author": repo.name.split("/")[-2], "sha": commit.sha}
    counts = {"downloads": 0, "likes": 0, "gated": False, "disabled": False, "private": repo.private}
    dates = {"createdAt": repo.commits[0].date, "lastModified": commit.date}
    tags = [tag for tag in [*known.values(), *card.get("tags", [])] if tag]
    return Response(plain | counts | dates | known | {"tags": tags, "cardData": card, "siblings": siblings})


@route("GET HEAD", f"{FILES}/resolve/{REVISION}/(?P<path>.+)")
def resolve(hub: HubServer, request: Request, repo: Repo, revision: str, path: str) -> Response:
    """Send a file or a part of it."""
    commit = repo.at(revision)
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
    if path not in commit.files:
        raise HubError(404, f"{path} does not exist", "EntryNotFound", headers)
    data, pointer = commit.files[path], commit.lfs.get(path)
    headers |= {"ETag": f'"{commit.etag(path)}"', "Content-Type": "application/octet-stream"}
    if pointer:
        headers |= {"X-Linked-Etag": f'"{pointer.sha256}"', "X-Linked-Size": str(pointer.size)}
    if pointer and pointer.xet_hash:
        place = repo.name if repo.name.startswith("datasets/") else f"models/{repo.name}"
        refresh = f"{hub.url}/api/{place}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": pointer.xet_hash, "Link": f'<{refresh}>; rel="xet-auth"'}
    return part_of(data, request.headers.get("Range"), headers)


def add_ref(repo: Repo, ref: str, revision: str) -> Response:
    """Point a new ref at a revision."""
    if ref in repo.refs:
        raise HubError(409, f"{ref} exists already")
    repo.refs[ref] = repo.at(revision).sha
    return Response()


def described(entry: dict[str, Any]) -> dict[str, Any]:
    """A file as the description of its repository words it, from its tree entry."""
    lfs = entry.get("lfs")
    large = {"lfs": {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}} if lfs else {}
    return {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]} | large


def part_of(data: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    """All of `data`, or the one range that was `wanted`."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not found or found.groups() == ("", ""):
        return Response(data, headers=headers)
    first, last = found.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        raise HubError(416, "The file ends before that", headers={"Content-Range": f"bytes */{len(data)}"})
    return Response(data[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


def refusal(error: HubError) -> Response:
    """The answer for an error."""
    headers = error.headers | {"X-Error-Message": error.message.encode("ascii", "replace").decode()}
    headers |= {"X-Error-Code": error.code} if error.code else {}
    headers |= {"Retry-After": "0"} if error.status == 429 else {}
    return Response({"error": error.message}, error.status, headers)


def repo_key(kind: str | None, name: str) -> str:
    """Under which name `HubServer.repos` knows a repository."""
    return f"datasets/{name}" if kind in ("dataset", "datasets") else name
