"""Folders replaced whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from hf_earlyexit import folder_swap
from hf_earlyexit.errors import CheckpointError
from hf_earlyexit.files import inside, read_json, replaced_folder, write_file, write_json

FORMER = {"config.json": b"old", "model.safetensors": b"old weights", "notes.txt": b"mine", "plots/a.svg": b"old plot"}
NEW = {"config.json": b"new", "model.safetensors": b"new weights", "card.md": b"card", "plots/a.svg": b"new plot"}


def fill(folder, files):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path):
    fill(tmp_path / "model", FORMER)
    return tmp_path / "model"


@pytest.fixture
def no_swap(monkeypatch):
    """A system that cannot swap two folders."""

    def swap(one, other):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_swap, "swap", swap)


@pytest.fixture(params=["swapped", "moved"])
def way(request):
    """Both ways in which a folder is replaced."""
    if request.param == "moved":
        request.getfixturevalue("no_swap")


@pytest.mark.usefixtures("way")
def test_new_files_take_their_places_and_others_stay(target):
    with replaced_folder(target) as new:
        fill(new, NEW)
        assert content(target) == FORMER
    assert content(target) == FORMER | NEW
    assert os.listdir(target.parent) == ["model"]


def test_a_folder_that_is_not_there_appears_at_once(tmp_path):
    with replaced_folder(tmp_path / "deep" / "model") as new:
        fill(new, NEW)
        assert not (tmp_path / "deep" / "model").exists()
    assert content(tmp_path / "deep" / "model") == NEW


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("own"), KeyboardInterrupt()])
def test_an_error_while_writing_changes_nothing(target, error):
    def write():
        with replaced_folder(target, needs=1234) as new:
            fill(new, NEW)
            raise error

    with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as caught:
        write()
    if isinstance(error, OSError):
        assert "full" in str(caught.value)
        assert "takes about 1,234 bytes" in str(caught.value)
        assert caught.value.path == str(target)
    assert content(target) == FORMER
    assert os.listdir(target.parent) == ["model"]


@pytest.mark.usefixtures("no_swap")
@pytest.mark.parametrize("moves", range(4))
def test_an_error_while_files_move_takes_them_all_back(target, moves, monkeypatch):
    replace, left = Path.replace, [moves]

    def failing(self, place):
        left[0] -= 1
        if left[0] == -1:
            raise OSError("no more")
        return replace(self, place)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(CheckpointError, match="no more"), replaced_folder(target) as new:
        fill(new, NEW)
    assert left[0] < 0
    assert content(target) == FORMER
    assert os.listdir(target.parent) == ["model"]


def test_without_hard_links_the_former_files_are_copied(target, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *args: (_ for _ in ()).throw(OSError("no links here")))
    (target / "card.md").mkdir()  # a folder where a file should go
    with pytest.raises(CheckpointError), replaced_folder(target) as new:
        fill(new, NEW)
    assert content(target) == FORMER


@pytest.mark.usefixtures("no_swap")
def test_the_config_moves_last_and_right_after_the_weights(target, monkeypatch):
    order, replace = [], Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, place: (order.append(self.name), replace(self, place))[1])
    with replaced_folder(target) as new:
        fill(new, NEW)
    assert order[-2:] == ["model.safetensors", "config.json"]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (["model.safetensors"], ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
        (["model-00001-of-00003.safetensors"], ["model-00001-of-00002.safetensors"]),
    ],
)
def test_weights_that_would_be_read_in_place_of_the_new_ones_go(tmp_path, before, after):
    fill(tmp_path / "m", dict.fromkeys([*before, "model.onnx", "modeling.py"], b"old"))
    with replaced_folder(tmp_path / "m") as new:
        fill(new, dict.fromkeys(after, b"new"))
    assert set(content(tmp_path / "m")) == {*after, "model.onnx", "modeling.py"}
    with replaced_folder(tmp_path / "m") as new:  # without weights of its own it leaves them alone
        fill(new, {"notes.txt": b""})
    assert set(after) < set(content(tmp_path / "m"))


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        with replaced_folder(tmp_path / "model") as new:
            fill(new, NEW)
            (new / "model.safetensors").chmod(0o600)
        write_file(tmp_path / "one.json", b"{}")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~mask} == {(tmp_path / "one.json").stat().st_mode & 0o777}
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(CheckpointError, match="is a file; expected a folder"), replaced_folder(tmp_path / "model"):
        pass


@pytest.mark.usefixtures("way")
def test_a_link_to_a_folder_is_followed(target, tmp_path):
    (tmp_path / "link").symlink_to(target)
    with replaced_folder(tmp_path / "link") as new:
        fill(new, NEW)
    assert (tmp_path / "link").is_symlink()
    assert content(target) == FORMER | NEW


@pytest.mark.usefixtures("way")
def test_a_link_in_the_folder_is_replaced_not_written_through(target, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"keep")
    (target / "config.json").unlink()
    (target / "config.json").symlink_to(tmp_path / "elsewhere")
    with replaced_folder(target) as new:
        fill(new, NEW)
    assert (tmp_path / "elsewhere").read_bytes() == b"keep"
    assert (target / "config.json").read_bytes() == b"new"


def test_one_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "calibration.json"
    write_file(path, b"old")

    def full(*args):
        raise OSError("full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"calibration.json could not be written \(full\)"):
        write_file(path, b"new")
    assert content(tmp_path) == {"calibration.json": b"old"}


def test_json_comes_back_as_it_was_and_its_folder_is_made(tmp_path):
    path = tmp_path / "run" / "done.json"
    write_json(path, {"log": [1.5, None, "é"]})
    assert read_json(path) == {"log": [1.5, None, "é"]}
    with pytest.raises(CheckpointError, match=r"below\.json could not be written"):
        write_json(path / "below.json", {})


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ".", "", "link/x", "leak"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "leak").symlink_to(tmp_path / "outside.txt")
    with pytest.raises(CheckpointError, match="leads out of") as caught:
        inside(folder, name)
    assert caught.value.field == name
    assert inside(folder, "plots/a.svg") == folder / "plots" / "a.svg"


DAMAGED = {
    "deep": b"[" * 50_000 + b"]" * 50_000,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "utf-16": json.dumps({"model_type": "early_exit_bert"}).encode("utf-16"),
    "empty": b"",
    "cut": b'{"model_type": "early',
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "bytes": bytes(range(256)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_what_is_no_json_object_is_refused_with_its_path(tmp_path, data):
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON in UTF-8|holds a JSON)") as caught:
        read_json(path)
    assert caught.value.path == str(path)
