"""Folders load where the package is installed but not imported, and say what is missing where it is not installed."""

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import hf_earlyexit as ee
from hf_earlyexit import doors
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.modeling.shim import auto_map
from tests.families.tiny import door, tiny
from tests.processes import python
from tests.test_files import content

ROOT = Path(__file__).resolve().parents[2]
BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hf_earlyexit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
"""
LOAD = """
import json, sys
from pathlib import Path
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
def tried(call, *args, **kwargs):
    try:
        return type(call(*args, **kwargs)).__name__
    except Exception as error:
        return f"{type(error).__name__}: {error}"
out = {}
for name, auto in (("config", AutoConfig), ("model", AutoModel), ("classifier", AutoModelForSequenceClassification)):
    out[name] = [tried(auto.from_pretrained, "model", **trust) for trust in ({}, {"trust_remote_code": True})]
out["pipeline"] = tried(pipeline, "text-classification", "model", trust_remote_code=True)
out["tokenizer"] = tried(AutoTokenizer.from_pretrained, "model")
"""
AGAIN = """
model = AutoModel.from_pretrained("model", trust_remote_code=True)
out["module"] = type(model).__module__
model.save_pretrained("again")
type(model).from_pretrained("again").config.save_pretrained("config")
"""


@pytest.fixture(scope="module")
def folder(tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shim")
    tiny_model().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def run(folder, code):
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    child = python(code + '\nprint("\\n" + json.dumps(out))', cwd=folder, environment=environment)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_installed_but_not_imported_loads_with_trust_only_and_saves_no_code(folder):
    found = run(folder, LOAD + AGAIN)
    loaded = {"config": "EarlyExitBertConfig", "model": doors.EarlyExitBertForSequenceClassification.__name__}
    loaded["classifier"] = loaded["model"]
    for name, expected in loaded.items():
        assert found[name][1] == expected
    assert "trust_remote_code=True" in found["config"][0]
    assert found["pipeline"] == "TextClassificationPipeline"
    assert found["module"] == "hf_earlyexit.doors"
    assert content(folder / "again") == {
        name: data for name, data in content(folder / "model").items() if not name.startswith("token")
    }
    assert set(content(folder / "config")) == {"config.json", "modeling_hf_earlyexit.py"}


def test_folders_of_every_family_load_with_trust_by_what_their_shims_name(tmp_path):
    """In one process: the first brings the package with it, and every other still names its own classes."""
    for name in FAMILIES:
        tiny(name).save_pretrained(tmp_path / "all" / name)
    found = run(
        tmp_path,
        """
import json
from pathlib import Path
from transformers import AutoConfig, AutoModel
out = {}
for place in sorted(Path("all").iterdir()):
    loaded = [auto.from_pretrained(place, trust_remote_code=True) for auto in (AutoConfig, AutoModel)]
    out[place.name] = [type(one).__name__ for one in loaded] + [(place / "modeling_hf_earlyexit.py").read_text()]
""",
    )
    for name in FAMILIES:
        names = [door(name).config_class.__name__, door(name).__name__]
        assert found[name] == [*names, f"from hf_earlyexit import {', '.join(names)}\n"]


def test_not_installed_says_what_to_install(folder):
    found = run(folder, BLOCKER + LOAD)
    for name in ("config", "model", "classifier"):
        assert "trust_remote_code=True" in found[name][0]
        assert found[name][1].startswith("ImportError")
        assert "pip install hf_earlyexit" in found[name][1]
    assert "pip install hf_earlyexit" in found["pipeline"]


def test_imported_needs_no_trust(folder):
    assert type(AutoModelForSequenceClassification.from_pretrained(folder / "model")).__module__ == doors.__name__


def test_the_map_names_what_the_package_offers_and_the_auto_classes_know(folder):
    values = json.loads((folder / "model" / "config.json").read_text())
    assert values["auto_map"] == auto_map(
        "EarlyExitBertConfig", "EarlyExitBertForSequenceClassification", ee.EarlyExitBertConfig.auto_models
    )
    assert set(values["auto_map"]) == {"AutoConfig", *ee.EarlyExitBertConfig.auto_models}
    for target in values["auto_map"].values():
        assert hasattr(ee, target.partition(".")[2])
    assert ee.EarlyExitBertConfig.door == doors.EarlyExitBertForSequenceClassification.__name__


def test_a_class_of_ones_own_is_saved_as_transformers_does(tiny_config, tmp_path, monkeypatch):
    class Mine(ee.EarlyExitBertForSequenceClassification):
        pass

    Mine.register_for_auto_class("AutoModel")
    assert Mine._auto_class == "AutoModel"
    ee.EarlyExitBertForSequenceClassification.register_for_auto_class("AutoModel")
    assert ee.EarlyExitBertForSequenceClassification._auto_class is None
    Mine._auto_class = None  # this file is no module to copy
    Mine(tiny_config()).save_pretrained(tmp_path)
    assert "modeling_hf_earlyexit.py" not in content(tmp_path)
