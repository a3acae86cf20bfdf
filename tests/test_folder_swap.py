"""A folder swapped for a new one: a kill at any instant leaves one of them whole, and nobody else's files are lost."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from hf_earlyexit import folder_swap
from hf_earlyexit.errors import CheckpointError
from hf_earlyexit.files import replaced_folder, write_file
from tests.test_files import FORMER, NEW, content, fill

ROOT = Path(__file__).resolve().parents[1]
NOBODY = 65534
KILLED = """
import json, os, shutil, signal, sys, types
from pathlib import Path
root, way, start = sys.argv[1:]
package = types.ModuleType("hf_earlyexit")  # without what the package loads on import
package.__path__ = [root + "/hf_earlyexit"]
sys.modules["hf_earlyexit"] = package
from hf_earlyexit import folder_swap
from hf_earlyexit.files import replaced_folder, write_file
OLD = {"config.json": "old", "model.safetensors": "old weights", "notes.txt": "mine", "plots/a.svg": "plot", "deep/b/c": "1"}
NEW = {"config.json": "new", "model.safetensors": "new weights", "card.md": "card", "plots/a.svg": "new plot"}
target = Path("model")
def fill(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
def content():
    return {str(path.relative_to(target)): path.read_text() for path in target.rglob("*")
            if path.is_file() and not path.name.startswith("_config.json.saving-")}
def save():
    if way == "file":
        write_file(target / "config.json", b"new")
        return
    with replaced_folder(target) as new:
        fill(new, NEW)
def die_at(step):
    left = [step]
    def count(event):
        left[0] -= event == "line" or event == "open" or event.startswith(("os.", "shutil."))
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    def trace(frame, event, value):
        if frame.f_code.co_filename.startswith(package.__path__[0]):
            count(event)
            return trace
    sys.addaudithook(lambda event, values: count(event))
    sys.settrace(trace)
def no_swap(one, other):
    raise OSError("not here")
if way == "moved":
    folder_swap.swap = no_swap
former = OLD if start == "full" else None
after = {**OLD, "config.json": "new"} if way == "file" else {**(former or {}), **NEW}
found, leftovers = [], []
while not found or found[-1][0] != 0:
    shutil.rmtree(target, ignore_errors=True)
    if former is not None:
        fill(target, former)
    child = os.fork()
    if not child:
        die_at(len(found) + 1)
        save()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    now = content() if target.exists() else None
    found.append([code, "old" if now == former else "new" if now == after else f"torn {now}"])
    save()
    assert content() == after
    leftovers += [str(path) for path in [*Path().iterdir(), *target.iterdir()] if "saving" in path.name]
print(json.dumps({"found": found, "leftovers": leftovers}))
"""


@pytest.fixture
def in_memory():
    """A folder on a file system without a disk, if there is one: thousands of small files are written there."""
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=shared) as folder:
        yield folder


def killed(folder, way, start="full"):
    """What a child found that was killed before each line of ours and each call of the system, one after another."""
    words = [sys.executable, "-c", KILLED, str(ROOT), way, start]
    child = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-4000:]
    told = json.loads(child.stdout)
    assert told["leftovers"] == [], "the next save removes what a kill left"
    codes, states = zip(*told["found"], strict=True)
    assert set(codes[:-1]) == {-9}
    assert codes[-1] == 0
    return states


@pytest.mark.parametrize("start", ["full", "absent"])
def test_a_kill_at_any_instant_leaves_the_former_folder_or_the_new_one(in_memory, start):
    states = killed(in_memory, "swapped", start)
    assert len(states) > 100
    assert set(states) == {"old", "new"}
    assert list(states) == sorted(states, reverse=True), "old first, and new from one instant on"


def test_a_kill_while_a_file_is_written_leaves_the_former_file_or_the_new_one(in_memory):
    states = killed(in_memory, "file")
    assert list(states) == sorted(states, reverse=True)
    assert set(states) == {"old", "new"}


def test_where_folders_cannot_be_swapped_only_a_kill_between_moves_shows_both(in_memory):
    """Also the proof that the kills above come at the instants that matter."""
    states = killed(in_memory, "moved")
    torn = [state for state in states if state.startswith("torn")]
    assert (states[0], states[-1]) == ("old", "new")
    assert torn
    assert not any("'config.json': 'new'" in state and "old weights" in state for state in torn)


@pytest.fixture
def target(tmp_path):
    fill(tmp_path / "model", FORMER)
    return tmp_path / "model"


def save(target):
    with replaced_folder(target) as new:
        fill(new, NEW)


@pytest.fixture
def swaps(monkeypatch):
    """How often folders were swapped."""
    seen, swap = [], folder_swap.swap
    monkeypatch.setattr(folder_swap, "swap", lambda one, other: seen.append(swap(one, other)))
    return seen


def test_what_stays_is_the_same_file_with_the_same_mode(target, swaps):
    (target / "deep" / "empty").mkdir(parents=True)
    (target / "deep" / "run.log").write_text("one\n")
    (target / "link").symlink_to("deep")
    (target / "broken").symlink_to("nowhere")
    for name, mode in ((".", 0o750), ("deep", 0o700), ("notes.txt", 0o640)):
        (target / name).chmod(mode)
    before = (target / "deep" / "run.log").stat().st_ino
    with open(target / "deep" / "run.log", "a") as log:
        save(target)
        log.write("two\n")  # one who writes goes on writing
    assert (target / "deep" / "run.log").read_text() == "one\ntwo\n"
    assert (target / "deep" / "run.log").stat().st_ino == before
    assert (target / "deep" / "empty").is_dir()
    assert (os.readlink(target / "link"), os.readlink(target / "broken")) == ("deep", "nowhere")
    assert [(target / name).stat().st_mode & 0o777 for name in (".", "deep", "notes.txt")] == [0o750, 0o700, 0o640]
    assert len(swaps) == 1
    assert os.listdir(target.parent) == ["model"]


def test_what_others_write_meanwhile_is_kept(target, monkeypatch):
    swap = folder_swap.swap

    def late(one, other):
        fill(target, {"rng_state_1.pth": b"late", "more/x": b"late"})
        (target / "notes.txt").rename(target / "away.txt")
        fill(target, {"notes.txt": b"mine, written anew"})
        swap(one, other)

    monkeypatch.setattr(folder_swap, "swap", late)
    save(target)
    more = {"rng_state_1.pth": b"late", "more/x": b"late", "notes.txt": b"mine, written anew", "away.txt": b"mine"}
    assert content(target) == {**FORMER, **NEW, **more}


@pytest.mark.parametrize("name", ["sync", "_follow"])
def test_a_fault_after_the_swap_swaps_back(target, monkeypatch, name):
    real = getattr(folder_swap, name)

    def failing(*args, **kwargs):
        if content(target) != FORMER:
            raise OSError("no more")
        real(*args, **kwargs)

    monkeypatch.setattr(folder_swap, name, failing)
    with pytest.raises(CheckpointError, match="no more"):
        save(target)
    assert content(target) == FORMER
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.parametrize("case", ["works here", "works below", "mount", "too many", "no links", "other system"])
def test_folders_that_cannot_be_swapped_are_filled_in_place(target, monkeypatch, swaps, case):
    def refuse(*args, **kwargs):
        raise OSError(18, "Invalid cross-device link")

    if case.startswith("works"):
        monkeypatch.chdir(target if case == "works here" else target / "plots")
    elif case == "mount":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == target)
    elif case == "too many":
        monkeypatch.setattr(folder_swap, "MOST_CARRIED", 1)
    elif case == "no links":
        monkeypatch.setattr(os, "link", refuse)
    else:
        monkeypatch.setattr(folder_swap.sys, "platform", "win32")
        monkeypatch.setattr(folder_swap.ctypes, "CDLL", lambda *args, **kwargs: object())
    number = target.stat().st_ino
    save(target)
    assert target.stat().st_ino == number
    assert content(target) == FORMER | NEW
    assert os.listdir(target.parent) == ["model"]
    assert not swaps


def test_swapping_changes_names_alone_and_says_what_it_cannot(tmp_path):
    fill(tmp_path / "a", {"x": b"1"})
    fill(tmp_path / "b", {"y": b"2"})
    folder_swap.swap(tmp_path / "a", tmp_path / "b")
    assert (content(tmp_path / "a"), content(tmp_path / "b")) == ({"y": b"2"}, {"x": b"1"})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        folder_swap.swap(tmp_path / "a", tmp_path / "nowhere")


def test_leftovers_go_but_not_those_of_a_save_that_still_runs(target):
    fill(target.parent / "_model.saving-1234abcd", {"new/x": b""})
    (target.parent / "_model.saving-1234abcd" / "new").chmod(0o500)
    (target.parent / "_model.saving-0000ffff").write_bytes(b"half")
    fill(target.parent / "_other.saving-1234abcd", {"x": b""})
    with replaced_folder(target) as outer:
        fill(outer, {"outer": b""})
        save(target)
        assert outer.is_dir()
    assert content(target) == {**FORMER, **NEW, "outer": b""}
    assert sorted(os.listdir(target.parent)) == ["_other.saving-1234abcd", "model"]


@contextmanager
def without_privileges():
    """Root may write everywhere, so it becomes somebody else for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_folder_is_refused():
    with TemporaryDirectory() as place:  # where others may look, unlike pytest's own folders
        target = Path(place) / "model"
        fill(target, FORMER)
        for folder in (target, target.parent):
            folder.chmod(0o555)
        with without_privileges(), pytest.raises(CheckpointError, match="could not be written"):
            save(target)
        for folder in (target.parent, target):
            folder.chmod(0o700)
        assert content(target) == FORMER
        assert os.listdir(place) == ["model"]


def test_a_file_written_alone_leaves_no_leftovers_either(target):
    (target / "_a.json.saving-1234abcd").write_bytes(b"half")
    write_file(target / "a.json", b"{}")
    assert content(target) == FORMER | {"a.json": b"{}"}
