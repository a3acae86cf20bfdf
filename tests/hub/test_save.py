"""One folder that holds everything."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import CheckpointError, UsageError
from hf_earlyexit.hub import save as module
from tests.hub.toy import calibrate, make_all, make_model, make_tokenizer, told
from tests.test_files import content


@pytest.fixture(scope="module")
def everything():
    return make_all()


def test_everything_is_in_the_folder_and_comes_back(everything, tmp_path):
    model, tokenizer, results = everything
    ee.save(model, tmp_path / "model", tokenizer=tokenizer, calibration=results)
    loaded = AutoModel.from_pretrained(tmp_path / "model")
    assert told(loaded, AutoTokenizer.from_pretrained(tmp_path / "model")) == told(model)
    assert module.load_calibrations(tmp_path / "model") == results
    wanted = {"README.md", "config.json", "model.safetensors", "modeling_hf_earlyexit.py", "tokenizer.json"}
    assert wanted <= set(content(tmp_path / "model"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_single_calibration_is_saved_as_calibrate_saves_it(tmp_path):
    model = make_model()
    result = calibrate(model)[0]
    model.set_exit_policy(result)
    ee.save(model, tmp_path, calibration=result, card=False)
    assert ee.calibration.CalibrationResult.load(tmp_path / "calibration.json") == result
    assert module.load_calibrations(tmp_path) == result
    assert not (tmp_path / "README.md").exists()


def test_a_folder_without_calibration_has_none(tmp_path):
    ee.save(make_model(), tmp_path, card=False)
    assert module.load_calibrations(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "hf_earlyexit.calibrations/1"}', '{"format": "other"}'])
def test_a_damaged_calibration_is_refused_with_its_path(tmp_path, text):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"calibration\.json") as caught:
        module.load_calibrations(tmp_path)
    assert caught.value.path == str(tmp_path / "calibration.json")


def test_a_calibration_the_model_does_not_use_is_refused(tmp_path):
    model = make_model()
    result = calibrate(model)[0]
    with pytest.raises(UsageError, match=r"call model\.set_exit_policy"):
        ee.save(model, tmp_path / "model", calibration=result)
    model.set_exit_policy(result)
    with torch.no_grad():
        model.classifier.bias.add_(1)
    with pytest.raises(CheckpointError, match="Calibrate again"):
        ee.save(model, tmp_path / "model", calibration=result)
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["../outside.md", "/tmp/outside.md", "a/../../outside.md"])
def test_a_card_cannot_write_outside_the_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr("hf_earlyexit.hub.model_card.model_card_files", lambda *args, **fields: {name: b"x"})
    with pytest.raises(CheckpointError, match="leads out of"):
        ee.save(make_model(), tmp_path / "deep" / "model")
    assert content(tmp_path) == {}


def test_card_fields_reach_the_card_writer(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "hf_earlyexit.hub.model_card.model_card_files",
        lambda model, calibration, **fields: seen.update(fields, names=list(calibration)) or {"README.md": b"card"},
    )
    ee.save(make_model(), tmp_path, card={"license": "mit"}, repo_id="me/m")
    assert seen == {"license": "mit", "repo_id": "me/m", "names": []}


def test_a_tokenizer_that_fails_leaves_the_former_folder(tmp_path):
    ee.save(make_model(), tmp_path / "model", tokenizer=make_tokenizer(), card=False)
    former = content(tmp_path)

    class Broken:
        def get_vocab(self):
            return {}

        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("half")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ee.save(make_model(seed=1), tmp_path / "model", tokenizer=Broken(), card=False)
    assert content(tmp_path) == former


def test_a_full_disk_names_the_folder_that_was_asked_for(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match="could not be written") as caught:
        ee.save(make_model(), tmp_path / "model", card=False)
    assert caught.value.path == str(tmp_path / "model")
    assert "saving" not in str(caught.value)
    assert content(tmp_path) == {}


def test_pushing_what_is_no_folder_is_told_in_one_line(capsys):
    assert main(["push", "nowhere", "--repo_id", "me/m"]) == 2
    assert "nowhere is no folder" in capsys.readouterr().err


def test_config_and_calibration_are_plain_json(everything, tmp_path):
    model, _, results = everything
    ee.save(model, tmp_path, calibration=results, card=False)
    for name in ("config.json", "calibration.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=lambda word: pytest.fail(word))
