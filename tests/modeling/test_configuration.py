"""What a configuration refuses, when, and in which words."""

import json
import math
import tracemalloc
from contextlib import contextmanager

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import BertModel

import hf_earlyexit as ee
from hf_earlyexit.errors import EarlyExitConfigError, PolicyError, UnknownNameError


def test_every_layer_has_an_exit_unless_told_otherwise(tiny_config):
    assert tiny_config().exit_layers == [1, 2, 3, 4]
    assert tiny_config(exit_layers=[2, 4]).exit_layers == [2, 4]
    assert tiny_config(num_hidden_layers=1).exit_layers == [1]


def test_no_exit_layers_asked_for_of_a_plain_checkpoint_are_all_of_them(tiny_config, tmp_path):
    BertModel(tiny_config()).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    plain = {name: value for name, value in values.items() if not name.startswith("exit_")}
    (tmp_path / "config.json").write_text(json.dumps(plain | {"model_type": "bert"}))
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path, exit_layers=None)
    assert model.exit_layers == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "layers",
    [[], [0, 4], [-1, 4], [2, 5], [4, 2], [2, 2, 4], [1, 2, 3], [1, 2, 10**9]],
    ids=["none", "zero", "negative", "beyond", "unsorted", "doubled", "without the last", "huge"],
)
def test_exit_layers_that_cannot_work_are_refused(tiny_config, layers):
    with pytest.raises(EarlyExitConfigError, match=r"exit_layers is .* expected layer numbers from 1 to 4") as caught:
        tiny_config(exit_layers=layers)
    assert (caught.value.field, caught.value.value) == ("exit_layers", layers)


@pytest.mark.parametrize("layers", ["2,4", [2.0, 4.0], (2, 4), [None, 4], [True, 4], True])
def test_exit_layers_of_another_type_are_refused_by_name(tiny_config, layers):
    with pytest.raises((EarlyExitConfigError, StrictDataclassFieldValidationError), match="exit_layers"):
        tiny_config(exit_layers=layers)


@contextmanager
def nothing_large_is_made():
    """Python's own lists and texts stay below 32 MB: a list of a billion layers needs thousands."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [-1, 0, 10**9, 10**20])
def test_impossible_numbers_of_layers_are_refused_at_once(tiny_config, count):
    with nothing_large_is_made(), pytest.raises(EarlyExitConfigError, match="num_hidden_layers"):
        tiny_config(num_hidden_layers=count)


def test_an_impossible_number_of_layers_in_a_saved_folder_is_refused_at_once(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 10**9, "exit_layers": None}))
    with nothing_large_is_made(), pytest.raises(EarlyExitConfigError, match="num_hidden_layers is 1000000000"):
        ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path)


def test_a_policy_with_the_wrong_number_of_thresholds_is_refused(tiny_config):
    with pytest.raises(EarlyExitConfigError, match=r"exit_policy is .* expected 3 thresholds, one per exit but the last"):
        tiny_config(exit_policy={"name": "confidence", "thresholds": [0.9, 0.9]})


def test_a_policy_for_other_exits_is_refused(tiny_config):
    policy = ee.ConfidencePolicy(thresholds=[0.9], exit_layers=[3, 4])
    with pytest.raises(EarlyExitConfigError, match=r"\[3, 4\].*a policy for the exit layers \[2, 4\]"):
        tiny_config(exit_layers=[2, 4], exit_policy=policy.to_dict())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "multi_label_classification"),
        ({"problem_type": "multi_label_classification"}, "single_label_classification"),
        ({"num_labels": 1}, "single_label_classification"),
    ],
)
def test_a_policy_for_another_problem_type_is_refused(tiny_config, fields, problem):
    policy = {"name": "confidence", "thresholds": [0.9] * 3, "problem_type": problem}
    with pytest.raises(EarlyExitConfigError, match=f"exit_policy is '{problem}'; expected a policy for"):
        tiny_config(exit_policy=policy, **fields)


def test_an_unknown_policy_or_head_comes_with_a_suggestion(tiny_config):
    with pytest.raises(UnknownNameError, match=r"Unknown policy 'confidense'. Did you mean 'confidence'"):
        tiny_config(exit_policy={"name": "confidense", "thresholds": [0.9] * 3})
    with pytest.raises(UnknownNameError, match=r"Unknown exit head 'linear-maen'. Did you mean 'linear-mean'"):
        tiny_config(exit_head="linear-maen")


@pytest.mark.parametrize("name", ["os.system", "hf_earlyexit.policies.confidence.ConfidencePolicy", "", None, 3])
def test_a_policy_is_never_imported_by_its_path(tiny_config, name):
    with pytest.raises(UnknownNameError, match="Unknown policy"):
        tiny_config(exit_policy={"name": name, "thresholds": [0.9] * 3})


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -0.1, 1.5, True, "0.9"])
def test_a_threshold_out_of_range_is_refused_by_name(tiny_config, threshold):
    with pytest.raises(PolicyError, match=r"thresholds\[1\] is .* expected a finite number from 0 to 1") as caught:
        tiny_config(exit_policy={"name": "confidence", "thresholds": [0.9, threshold, 0.9]})
    assert caught.value.field == "thresholds[1]"


@pytest.mark.parametrize("patience", [0, -1, 4])
def test_a_patience_below_one_or_beyond_the_exits_is_refused(tiny_config, patience):
    with pytest.raises(PolicyError, match=r"thresholds\[0\]"):
        tiny_config(exit_policy={"name": "patience", "thresholds": [patience, None, None]})


@pytest.mark.parametrize(
    "cost",
    [[1.0], [1, 2, 3, 3], [2, 1, 3, 4], [0, 1, 2, 3], [-1, 1, 2, 3], [1, math.nan, 3, 4], [1, 2, 3, math.inf]],
    ids=["short", "level", "falling", "zero", "negative", "nan", "inf"],
)
def test_exit_costs_that_cannot_work_are_refused(tiny_config, cost):
    with pytest.raises(EarlyExitConfigError, match=r"exit_cost is .* expected 4 ascending numbers above 0"):
        tiny_config(exit_cost=cost)


def test_exit_costs_may_be_any_ascending_numbers(tiny_config):
    assert tiny_config(exit_cost=[0.5, 2, 2.5, 7]).exit_cost == [0.5, 2, 2.5, 7]


def test_labels_that_disagree_in_number_are_refused(tiny_config):
    with pytest.raises(EarlyExitConfigError, match=r"label2id is .* expected 3 labels, as many as id2label has"):
        tiny_config(label2id={"a": 0, "b": 1}, id2label={0: "a", 1: "b", 2: "c"})


def test_a_decoder_is_refused(tiny_config):
    with pytest.raises(EarlyExitConfigError, match="is_decoder"):
        tiny_config(is_decoder=True)


def test_the_config_file_is_plain_json_and_comes_back_exactly(tiny_config, tmp_path):
    policy = ee.BeemPolicy(thresholds=[None, 0.1 + 0.2, None], weights=[1 / 3, 1, 1, 1], exit_layers=[1, 2, 3, 4])
    config = tiny_config(exit_policy=policy.to_dict(), exit_cost=[0.1, 1, 2, 3])
    config.save_pretrained(tmp_path)

    def refuse(name):
        raise AssertionError(f"{name} in config.json")

    text = (tmp_path / "config.json").read_text()
    values = json.loads(text, parse_constant=refuse)
    assert "__float__" not in text
    assert values["exit_policy"]["thresholds"] == [None, 0.1 + 0.2, None]
    loaded = ee.EarlyExitBertConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert ee.policies.ExitPolicy.from_dict(loaded.exit_policy) == policy


def test_unknown_fields_of_a_newer_minor_format_survive_saving(tiny_config, tmp_path):
    tiny_config(early_exit_version="1.0", exit_colour="green").save_pretrained(tmp_path)
    loaded = ee.EarlyExitBertConfig.from_pretrained(tmp_path)
    assert loaded.to_dict()["exit_colour"] == "green"


@pytest.mark.parametrize("version", ["1", "1.0.0", "one", "", "1.x", "-1.0", "1.0\n"])
def test_a_malformed_format_version_is_refused(tiny_config, version):
    with pytest.raises(EarlyExitConfigError, match=r"early_exit_version is .* expected a version such as '1.0'"):
        tiny_config(early_exit_version=version)


def test_a_newer_major_format_is_refused_with_the_way_out(tiny_config):
    with pytest.raises(EarlyExitConfigError, match=r"'2.0'; expected at most 1.x; upgrade: pip install --upgrade"):
        tiny_config(early_exit_version="2.0")


def test_what_the_user_sets_later_is_checked_when_a_model_is_made(tiny_config):
    config = tiny_config()
    config.exit_layers = [1, 3]
    with pytest.raises(EarlyExitConfigError, match="exit_layers"):
        ee.EarlyExitBertForSequenceClassification(config)


def test_resolved_problem_type_follows_the_stock_conventions(tiny_config):
    assert tiny_config().resolved_problem_type == "single_label_classification"
    assert tiny_config(num_labels=1).resolved_problem_type == "regression"
    assert tiny_config(problem_type="multi_label_classification").resolved_problem_type == "multi_label_classification"
