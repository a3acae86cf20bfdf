"""A damaged config.json, by every road that leads to it: what is ours names the file; the rest is written down as it is."""

import json

import pytest
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, EarlyExitError, PolicyError, UnknownNameError
from tests.hub.toy import make_model, make_tokenizer
from tests.test_files import DAMAGED

NAN = float("nan")
OURS = (
    lambda folder: ee.EarlyExitBertForSequenceClassification.from_pretrained(folder),
    lambda folder: ee.EarlyExitBertConfig.from_pretrained(folder),
    lambda folder: ee.pipeline(model=str(folder)),
)
STOCK = (
    AutoConfig.from_pretrained,
    AutoModel.from_pretrained,
    AutoModelForSequenceClassification.from_pretrained,
    lambda folder: pipeline("text-classification", model=str(folder)),
)


@pytest.fixture
def folder(tmp_path):
    model = make_model()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.5, 0.6, 0.7]))
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def command(folder, capsys):
    assert main(["explain", str(folder), "--text", "w5"]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_our_pipeline_and_commands_name_a_file_that_is_no_json_object(folder, data, capsys):
    (folder / "config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json (is not JSON|holds a JSON)"):
        ee.pipeline(model=str(folder))
    assert "config.json" in command(folder, capsys)


@pytest.mark.parametrize("road", STOCK)
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        *((name, OSError, r"config\.json' is not a valid JSON") for name in ("utf-16", "empty", "cut", "bytes")),
        ("a list", ValueError, "Unrecognized model in"),
        ("a number", TypeError, "not iterable"),
        ("null", TypeError, "not iterable"),
        ("deep", RecursionError, "recursion"),
        ("deep object", RecursionError, "recursion"),
    ],
)
def test_the_auto_classes_refuse_it_in_their_own_words(folder, road, damage, error, message):
    """They parse the file before they know whose it is. None goes on; the last four do not say which file."""
    (folder / "config.json").write_bytes(DAMAGED[damage])
    with pytest.raises(error, match=message):
        road(folder)


@pytest.mark.parametrize("road", [*OURS, *STOCK])
@pytest.mark.parametrize(
    ("change", "kind", "field"),
    [
        ({"hidden_size": "x"}, EarlyExitConfigError, "hidden_size"),
        ({"hidden_size": NAN}, EarlyExitConfigError, "hidden_size"),
        ({"num_hidden_layers": 10**9}, EarlyExitConfigError, "num_hidden_layers"),
        ({"exit_layers": "1,4"}, EarlyExitConfigError, "exit_layers"),
        ({"exit_policy": [1]}, EarlyExitConfigError, "exit_policy"),
        ({"exit_policy": {"name": "confidence", "thresholds": [NAN, 0.5, 0.5]}}, PolicyError, "thresholds[0]"),
        ({"exit_policy": {"name": "os.system"}}, UnknownNameError, None),
        ({"exit_cost": [1, 2, 3, NAN]}, EarlyExitConfigError, "exit_cost"),
        ({"label2id": {"a": 0}}, EarlyExitConfigError, "label2id"),
        ({"early_exit_version": "2.0"}, EarlyExitConfigError, "early_exit_version"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_by_every_road(folder, road, change, kind, field):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(kind, match=r"config\.json of ") as caught:
        road(folder)
    assert caught.value.path == str(folder)
    assert field is None or field in (caught.value.field, str(caught.value).split(": ")[1].split(" ")[0])
    assert "\n" not in str(caught.value)


def test_commands_tell_a_wrong_value_and_an_unknown_kind_in_one_line(folder, capsys):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "hidden_size": "x"}))
    assert f"config.json of {folder}: Validation error for field 'hidden_size'" in command(folder, capsys)
    path.write_text(json.dumps({name: value for name, value in values.items() if name != "model_type"}))
    assert "cannot be loaded" in command(folder, capsys)
    path.write_text(json.dumps({**values, "model_type": "bert", "architectures": ["BertForSequenceClassification"]}))
    assert "which has no exits" in command(folder, capsys)


def test_an_error_that_knows_its_file_is_passed_on_as_it_is(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(EarlyExitError) as caught:
        ee.EarlyExitBertConfig.from_pretrained(folder)
    assert caught.value.path == str(folder / "config.json")
    assert "config.json of" not in str(caught.value)
