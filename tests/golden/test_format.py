"""Folders of every format ever written load for ever and give the answers stored in them.

`python -m tests.golden.test_format FOLDER` writes a folder of the present format; do so for a new format only.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

import hf_earlyexit as ee
from hf_earlyexit.hub.save import load_calibrations
from tests.hub.toy import calibrate, make_model, make_tokenizer, texts

FOLDERS = sorted(path for path in Path(__file__).parent.glob("format-*") if path.is_dir())
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "max_position_embeddings": 64}


def answers(model, tokenizer):
    told = {}
    for point in (None, "fast", "balanced", "exact"):
        found = ee.predict(model, texts(), tokenizer=tokenizer, operating_point=point)
        told[str(point)] = {"logits": found.logits.tolist(), "exit_layer": found.exit_layer.tolist()}
    return told


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_a_folder_of_an_older_format_gives_the_stored_answers(folder, auto):
    model = auto.from_pretrained(folder)
    stored = json.loads((folder / "answers.json").read_text())
    assert model.config.early_exit_version == folder.name.removeprefix("format-")
    for point, found in answers(model, make_tokenizer()).items():
        assert found["exit_layer"] == stored["answers"][point]["exit_layer"], point
        assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(stored["answers"][point]["logits"]), atol=1e-6)
    for name, thresholds in stored["thresholds"].items():
        assert list(model.policy_at(name).thresholds) == thresholds
        assert load_calibrations(folder)[name].policy == model.policy_at(name)
    assert model.config.exit_certificate["fingerprint"] == load_calibrations(folder)["balanced"].fingerprint


def test_an_operating_point_of_a_name_no_longer_given_still_loads(tmp_path):
    shutil.copytree(Path(__file__).parent / "format-1.0", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    for field in ("exit_operating_points", "exit_point_certificates"):
        config[field]["default"] = config[field].pop("fast")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModel.from_pretrained(tmp_path)
    found = ee.predict(model, texts(), tokenizer=make_tokenizer(), operating_point="default").exit_layer.tolist()
    assert found == json.loads((tmp_path / "answers.json").read_text())["answers"]["fast"]["exit_layer"]
    fast = load_calibrations(tmp_path)["fast"]
    model.set_operating_points({"fast": fast}, keep_others=True)
    ee.save(model, tmp_path, calibration={"fast": fast}, card=False)
    assert set(AutoModel.from_pretrained(tmp_path).operating_points) == {"exact", "default", "balanced", "fast"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_golden_folders_are_small_and_say_more_than_one_thing(folder):
    assert sum(path.stat().st_size for path in folder.iterdir()) < 200_000
    stored = json.loads((folder / "answers.json").read_text())["answers"]
    assert len(set(stored["None"]["exit_layer"])) == 3
    assert stored["fast"] != stored["balanced"]


def test_the_present_format_is_among_them():
    from hf_earlyexit.modeling.configuration import FORMAT_VERSION

    assert f"format-{FORMAT_VERSION}" in [folder.name for folder in FOLDERS]


def write(folder):
    model = make_model(4, **SMALL)
    results = dict(zip(("fast", "balanced"), calibrate(model, (1.5, 2.2)), strict=True))
    model.set_operating_points(results, default="balanced")
    ee.save(model, folder, calibration=results, card=False)
    thresholds = {name: list(result.policy.thresholds) for name, result in results.items()}
    told = {"answers": answers(model, make_tokenizer()), "thresholds": thresholds}
    (Path(folder) / "answers.json").write_text(json.dumps(told) + "\n")


if __name__ == "__main__":
    write(sys.argv[1])
