"""A save that fails leaves what was there; a save that is killed leaves the old folder or the new one."""

import json
import os
from pathlib import Path

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, UsageError
from tests.processes import python
from tests.test_files import DAMAGED, content

Door = ee.EarlyExitBertForSequenceClassification
ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
import hf_earlyexit as ee
from tests.hub.toy import calibrate, make_model
from transformers.utils import logging
logging.disable_progress_bar()
Door = ee.EarlyExitBertForSequenceClassification
def content():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}
old, new = make_model(0), make_model(1)
for model in (old, new):
    model.set_exit_policy(calibrate(model, [2.5])[0])
old.save_pretrained("model")
"""
FULL = """
former, found = content(), []
total = sum(map(len, former.values()))
for size in [*range(0, 20000, 2500), *range(20000, total, total // 12)]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        new.save_pretrained("model")
        found.append("saved")
    except ee.EarlyExitError as error:
        found.append(f"{type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert content() == former or found[-1] == "saved", "the former folder has changed"
print(json.dumps(found))
"""
KILLED = """
import shutil
from hf_earlyexit import folder_swap
def killed_at(step):
    seen = [0]
    def reached():
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
    def around(call):
        def counted(*args, **kwargs):
            reached()
            result = call(*args, **kwargs)
            reached()
            return result
        return counted
    os.replace = around(os.replace)
    if sys.argv[1] == "swapped":  # what becomes of every line in between: tests/test_folder_swap.py
        os.link, os.mkdir, os.rename = map(around, (os.link, os.mkdir, os.rename))
        folder_swap.swap, Path.write_text, shutil.rmtree = map(around, (folder_swap.swap, Path.write_text, shutil.rmtree))
    save(new)
    os._exit(0)
def one_folder():
    return {name: data for name, data in content().items() if name.startswith("model/")}
def save(model):
    model.save_pretrained("model")
def refuse(*paths):
    raise OSError("not here")
if sys.argv[1] == "moved":
    folder_swap.swap = refuse
def state():
    now = one_folder()
    if now in (first, second):
        return "old" if now == first else "new"
    try:
        Door.from_pretrained("model")
    except ee.EarlyExitError as error:
        return f"{type(error).__name__}: {error}"
    return "torn"
save(new)
second = one_folder()
save(old)
first, found = one_folder(), []
while not found or found[-1][0] != 0:
    save(old)
    assert one_folder() == first and not [path for path in Path().iterdir() if "saving" in path.name]
    child = os.fork()
    if not child:
        killed_at(len(found) + 1)
    found.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), state()])
print(json.dumps(found))
"""


def run(folder, code, *words):
    child = python(PRELUDE + code, *words, cwd=folder)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_a_full_disk_leaves_the_former_folder(tmp_path):
    found = run(tmp_path, FULL)
    assert len(found) >= 18
    assert all("CheckpointError" in one and "could not be written" in one and "Make room" in one for one in found[:-2])
    assert sum("CheckpointError" in one for one in found) >= 18


def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path):
    states = [state for _, state in run(tmp_path, KILLED, "swapped")]
    assert len(states) >= 10
    assert states == sorted(states, reverse=True)
    assert set(states) == {"old", "new"}


def test_a_kill_where_folders_cannot_be_swapped_leaves_a_model_or_an_error(tmp_path):
    states = [state for _, state in run(tmp_path, KILLED, "moved")]
    assert (states[0], states[-1]) == ("old", "new")
    mixed = [state for state in states if state not in ("old", "new")]
    assert mixed  # between the renames of weights and config: the certificate tells
    assert all("CheckpointError" in state and "saved or edited in part" in state for state in mixed)


def test_a_save_in_place_keeps_the_other_files(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.5, 0.5, 0.5]))
    model.save_pretrained(tmp_path / "model")
    assert Door.from_pretrained(tmp_path / "model").exit_policy == model.exit_policy
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]


def test_a_failing_save_leaves_the_folder_and_names_it(tiny_model, tmp_path, monkeypatch):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    former = content(tmp_path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"model could not be written .*No space left") as caught:
        tiny_model(seed=1).save_pretrained(tmp_path / "model")
    assert caught.value.path == str(tmp_path / "model")
    assert content(tmp_path) == former


def test_shards_come_and_go(tiny_model, tmp_path, random_batch):
    first, second, batch = tiny_model(), tiny_model(seed=1), random_batch(4)
    first.save_pretrained(tmp_path)
    for model, size in ((second, "40KB"), (first, "70KB"), (second, "5GB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        with torch.inference_mode():
            assert torch.equal(Door.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "modeling_hf_earlyexit.py",
    ]


def test_other_processes_of_a_run_write_nothing(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model", is_main_process=False)
    assert content(tmp_path) == {}


def test_a_distributed_save_of_a_model_in_one_piece_changes_nothing(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    former = content(tmp_path)
    with pytest.raises(UsageError, match="sharded over processes"):
        tiny_model(seed=1).save_pretrained(tmp_path / "model", distributed_checkpoint=True)
    assert content(tmp_path) == former


def test_a_given_state_dict_is_saved_and_left_whole(tiny_model, tmp_path):
    state = dict(tiny_model(seed=3).state_dict())
    names = list(state)
    tiny_model().save_pretrained(tmp_path, state_dict=state)
    assert list(state) == names
    loaded = Door.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_config_that_is_no_json_object_is_refused_with_its_path(tiny_model, tmp_path, data):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    for cls in (Door, ee.EarlyExitBertConfig):
        with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a JSON)") as caught:
            cls.from_pretrained(tmp_path)
        assert caught.value.path == str(tmp_path / "config.json")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 3}, {"num_hidden_layers": 5}, {"num_hidden_layers": None}])
def test_another_number_of_layers_than_the_exits_were_made_for_is_refused(tiny_model, tmp_path, change):
    tiny_model().save_pretrained(tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), **change}
    text = json.dumps({name: value for name, value in values.items() if value is not None})  # None: deleted
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ee.EarlyExitError, match="exit_layers is"):
        Door.from_pretrained(tmp_path)


def test_no_pickle_is_read(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"trap": Trap()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Unsupported|safetensors"):
        Door.from_pretrained(tmp_path)
    assert not (tmp_path / "ran").exists()
