import dataclasses
import json

import pytest

from hf_earlyexit.calibration import CalibrationResult, FinalLayerError, MaxDrop, calibrate
from hf_earlyexit.errors import CheckpointError, EarlyExitError
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from tests.samples import learned_trace


def result(policy="beem-a", target=None, **options) -> CalibrationResult:
    return calibrate(learned_trace(300, seed=1, split="dev", fingerprint="abc"), policy, target or MaxDrop(0.01), **options)


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("per_exit", [True, False])
def test_a_result_through_json_is_the_same_to_the_last_digit(name, per_exit):
    options = {"weights": (0.1, 0.2, 0.3, 1 / 3)} if name == "beem" else None
    found = result(name, per_exit=per_exit, options=options)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert CalibrationResult.from_dict(json.loads(text)) == found


@pytest.mark.parametrize("problem_type", [MULTI_LABEL, REGRESSION])
def test_a_file_brings_the_same_result_back(tmp_path, problem_type):
    found = calibrate(learned_trace(200, problem_type=problem_type), "static", MaxDrop(0.1))
    found.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == found


def test_the_file_is_plain_json_with_a_format_and_null_for_closed_exits(tmp_path):
    found = result("static", MaxDrop(0.0))
    found.save(tmp_path / "calibration.json")
    values = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert values["format"] == "hf_earlyexit.calibration/1"
    assert values["curve"][0][2] == [None, None, None]
    assert values["policy"]["name"] == "static"


@pytest.mark.parametrize(
    "values", [{}, {"format": None}, {"format": "hf_earlyexit.calibration/2"}, {"format": "hf_earlyexit.trace/1"}]
)
def test_another_format_is_refused(values):
    with pytest.raises(CheckpointError, match=r"expected 'hf_earlyexit\.calibration/1'") as caught:
        CalibrationResult.from_dict({**result("confidence").to_dict(), "format": None, **values})
    assert caught.value.field == "format"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "hf_earlyexit.calibration/1"}'], ids=repr)
def test_a_damaged_file_is_refused_with_its_path(tmp_path, text):
    path = tmp_path / "calibration.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        CalibrationResult.load(path)
    assert caught.value.path == str(path)


def test_a_missing_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        CalibrationResult.load(tmp_path / "nowhere.json")
    assert caught.value.path == str(tmp_path / "nowhere.json")


def test_an_impossible_policy_in_the_file_is_refused():
    values = result("confidence").to_dict()
    values["policy"]["thresholds"][0] = 7.0
    with pytest.raises(EarlyExitError, match="finite number from 0 to 1"):
        CalibrationResult.from_dict(values)


def test_a_result_prints_as_a_table():
    found = result(target=FinalLayerError())
    lines = str(found).splitlines()
    assert lines[0].startswith("beem-a for FinalLayerError(")
    assert "240 rows of 'dev' (and 60 others for the policy's own numbers)" in lines[0]
    assert f"accuracy {found.quality:.4f} against {found.full_quality:.4f}" in lines[1]
    assert f"mean layers {found.mean_layers:.2f} of 4: layer speed-up {found.layer_speed_up:.2f}x" in lines[2]
    assert lines[3] == str(found.expected)
    head = next(index for index, line in enumerate(lines) if line.startswith("layer"))
    rows = lines[head + 1 : head + 5]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4"]
    for row, report in zip(rows, found.exits, strict=True):
        _, threshold, share, quality, *_ = row.split()
        assert threshold == ("-" if report.threshold is None else f"{report.threshold:.4f}")
        assert share == f"{report.share:.1%}"
        assert quality == f"{report.quality:.4f}"
    assert len({len(row) for row in rows}) == 1  # columns line up


def test_the_table_ends_with_the_notes():
    found = dataclasses.replace(result("confidence"), notes=("mind the gap", "and the step"))
    assert str(found).splitlines()[-2:] == ["note: mind the gap", "note: and the step"]


def test_a_policy_that_learned_nothing_does_not_speak_of_other_rows():
    assert "others" not in str(result("confidence"))
