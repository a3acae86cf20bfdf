"""A stored calibration is checked whole: every field by name, figures against each other, and all of it by its sum."""

import json
import math

import pytest

from hf_earlyexit.calibration import CalibrationResult, MaxDrop, calibrate
from hf_earlyexit.errors import CheckpointError
from hf_earlyexit.hub.save import load_calibrations
from hf_earlyexit.values import json_sum
from tests.samples import learned_trace


@pytest.fixture(scope="module")
def stored():
    trace = learned_trace(300, seed=1, split="dev", fingerprint="abc")
    return json.dumps(calibrate(trace, "beem-a", MaxDrop(0.02)).to_dict())


@pytest.fixture
def values(stored):
    return json.loads(stored)


def refused(tmp_path, values, sum_again=True):
    """The error that these values in a file give."""
    if sum_again:
        values["sha256"] = json_sum({name: value for name, value in values.items() if name != "sha256"})
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError) as caught:
        CalibrationResult.load(path)
    assert caught.value.path == str(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_what_was_not_touched_comes_back(tmp_path, values, stored):
    assert json.dumps(CalibrationResult.from_dict(values).to_dict()) == stored


@pytest.mark.parametrize(
    "edit",
    [
        lambda values: values["policy"]["thresholds"].__setitem__(0, 0.123),
        lambda values: values.__setitem__("quality", values["quality"] + 0.01),
        lambda values: values["curve"].pop(1),
        lambda values: values.__setitem__("num_rows", 10_000),
        lambda values: values.__setitem__("target", "MaxDrop(drop=0.0, sigmas=0.0)"),
        lambda values: values["notes"].append("all is well"),
        lambda values: values.pop("sha256"),
        lambda values: values.__setitem__("sha256", None),
    ],
)
def test_any_edit_by_hand_is_refused(tmp_path, values, edit):
    edit(values)
    refused(tmp_path, values, sum_again=False)


@pytest.mark.parametrize("value", [None, "x", [], {}, True, 10**18, -1, 10**400, math.nan])
@pytest.mark.parametrize("field", ["quality", "mean_layers", "exits", "curve", "num_rows", "versions", "notes", "policy"])
def test_a_wrong_field_is_named_even_with_a_sum_that_fits(tmp_path, values, field, value):
    if field == "quality" and value in (10**18, -1):  # a mean squared error may be anything below 0
        value = "0.9"
    if field == "num_rows" and value == 10**18:
        value = 10**40
    if (field, value) in (("notes", []), ("versions", {})):  # may be empty
        value = 3
    values[field] = value
    error = refused(tmp_path, values)
    assert (error.field or "").startswith(field) or field == "policy", str(error)


@pytest.mark.parametrize("field", ["quality", "standard_error", "exits", "curve", "seed", "policy", "fingerprint", "notes"])
def test_a_missing_field_is_named(tmp_path, values, field):
    del values[field]
    error = refused(tmp_path, values)
    assert error.field == ("exit_policy" if field == "policy" else field)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda v: v["exits"][1].__setitem__("share", 1.5), "exits[1].share"),
        (lambda v: v["exits"][1].__setitem__("share", v["exits"][1]["share"] / 2 + 0.1), "exits"),
        (lambda v: v["exits"][0].__setitem__("threshold", 0.1), "exits[0].threshold"),
        (lambda v: v["exits"][2].__setitem__("quality", None), "exits[2].quality"),
        (lambda v: v["exits"][2].pop("layer"), "exits[2].layer"),
        (lambda v: v["exits"][2].__setitem__("colour", "red"), "exits[2].colour"),
        (lambda v: v["exits"].pop(), "exits"),
        (lambda v: v["exits"][0].__setitem__("layer", 10**8), "exits[0].layer"),
        (lambda v: v["exits"][1].__setitem__("layer", 1), "exits"),
        (lambda v: v["curve"].__setitem__(0, [1.0]), "curve[0]"),
        (lambda v: v["curve"][0].__setitem__(0, None), "curve[0].0"),
        (lambda v: v["curve"][0].__setitem__(1, "high"), "curve[0].1"),
        (lambda v: v["curve"][0].__setitem__(2, [None]), "curve[0].2"),
        (lambda v: v["curve"][0].__setitem__(2, ["x"] * 3), "curve[0].2"),
        (lambda v: v.__setitem__("mean_layers", v["mean_layers"] * 0.9), "mean_layers"),
        (lambda v: v.__setitem__("layer_speed_up", v["layer_speed_up"] * 2), "layer_speed_up"),
        (lambda v: v.__setitem__("standard_error", -0.1), "standard_error"),
        (lambda v: v["policy"]["thresholds"].pop(), "thresholds"),
        (lambda v: v["policy"].__setitem__("weights", [1, 2, 3]), "weights"),
        (lambda v: v.__setitem__("extra", 1), "extra"),
    ],
)
def test_figures_that_do_not_fit_each_other_are_refused_by_name(tmp_path, values, edit, field):
    edit(values)
    assert refused(tmp_path, values).field == field


def test_several_results_in_one_file_are_tied_to_their_names(tmp_path, values):
    path = tmp_path / "calibration.json"
    several = {"format": "hf_earlyexit.calibrations/1", "results": {"fast": values, "slow": values}}
    path.write_text(json.dumps({**several, "sha256": json_sum(several)}))
    assert set(load_calibrations(tmp_path)) == {"fast", "slow"}
    several["results"]["default"] = several["results"].pop("fast")
    path.write_text(json.dumps({**several, "sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="changed places or names") as caught:
        load_calibrations(tmp_path)
    assert caught.value.path == str(path)


@pytest.mark.parametrize("results", [None, [], {}, "x", 3])
def test_results_that_are_none_are_refused(tmp_path, results):
    (tmp_path / "calibration.json").write_text(json.dumps({"format": "hf_earlyexit.calibrations/1", "results": results}))
    with pytest.raises(CheckpointError, match="results is") as caught:
        load_calibrations(tmp_path)
    assert (caught.value.field, caught.value.path) == ("results", str(tmp_path / "calibration.json"))


def test_a_fault_in_one_of_several_is_named_by_its_place(tmp_path, values):
    values["exits"][1]["share"] = 2
    several = {"format": "hf_earlyexit.calibrations/1", "results": {"fast": values}}
    (tmp_path / "calibration.json").write_text(json.dumps(several))
    with pytest.raises(CheckpointError) as caught:
        load_calibrations(tmp_path)
    assert caught.value.field == "results.fast.exits[1].share"
