"""JSON that is read with care, and numbers that are what they should be."""

import json
import math
import time
from functools import partial

import pytest

from hf_earlyexit.calibration import MaxDrop, SpeedUp, parse_target
from hf_earlyexit.errors import CalibrationError, CheckpointError, DataError, EarlyExitError, PolicyError, UsageError
from hf_earlyexit.policies import ExitPolicy
from hf_earlyexit.values import (
    DEEPEST,
    MOST_BYTES,
    are_layers,
    check_choice,
    check_real,
    check_whole,
    is_real,
    is_whole,
    json_sum,
    parse_json,
    shown,
)

HUGE = 10**400
VALID = {
    "confidence": {"name": "confidence", "thresholds": [0.5, None], "exit_layers": [1, 2, 3]},
    "patience": {"name": "patience", "thresholds": [1, 1]},
    "beem": {"name": "beem", "thresholds": [0.5, 1.0], "weights": [1.0, 1.0, 1.0], "vote": "log-odds"},
    "beem-calibrated": {
        "name": "beem-calibrated",
        "thresholds": [0.5, 0.5],
        "slopes": [1.0] * 3,
        "offsets": [[0.0, 0.1]] * 3,
    },
    "reward": {"name": "reward", "thresholds": [0.5, 0.5], "weights": [0.1] * 81},
    "static": {"name": "static", "thresholds": [None, 2.0]},
    "gate": {"name": "gate", "thresholds": [0.5, 0.5]},
}
STRANGE = [
    None,
    True,
    -1,
    HUGE,
    -HUGE,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
    {},
    {"a": 1},
    [],
    [[]],
    [{}],
    [HUGE],
    [math.nan],
    ["0.5"],
    [None] * 7,
]


@pytest.mark.parametrize("name", VALID)
def test_no_value_of_any_type_makes_a_policy_fall_over(name):
    """It is refused in words of this library, or taken as a number that serves."""
    ExitPolicy.from_dict(VALID[name])
    deep, longest = [0.5], 0
    for _ in range(900):
        deep = [deep]
    for field in (*VALID[name], "muted", "problem_type", "exit_layers"):
        places = [(field, None)] + [(field, index) for index in range(2) if isinstance(VALID[name].get(field), list)]
        for value in [*STRANGE, deep]:
            for field, index in places:
                values = json.loads(json.dumps(VALID[name]))
                if index is None:
                    values[field] = value
                else:
                    values[field][index] = value
                try:
                    policy = ExitPolicy.from_dict(values)
                except EarlyExitError as error:
                    longest = max(longest, len(str(error)))
                    continue
                numbers = [number for number in policy.thresholds if number is not None]
                assert all(math.isfinite(float(number)) for number in numbers), (field, value)
    assert 0 < longest < 1000


@pytest.mark.parametrize(
    ("check", "highest", "above", "kind", "expected"),
    [
        (partial(check_whole, 2), 2**53, 2**53 + 1, UsageError, "a whole number from 2"),
        (partial(check_whole, 2, 9, error=DataError), 9, 10, DataError, "a whole number from 2 to 9"),
        (partial(check_real, 2, error=DataError), 1e300, HUGE, DataError, "a finite number from 2"),
        (partial(check_real, 0.5, 2.5), 2.5, 2.6, UsageError, "a finite number from 0.5 to 2.5"),
    ],
)
def test_a_number_out_of_its_range_is_refused_by_name_and_kind(check, highest, above, kind, expected):
    check(first=2, second=highest)
    for wrong in (above, 0, True, "2", None, math.nan, math.inf, -HUGE):
        with pytest.raises(kind) as caught:
            check(first=2, second=wrong)
        assert (caught.value.field, caught.value.value) == ("second", wrong)
        assert str(caught.value) == f"second is {shown(wrong)}; expected {expected}."


def test_a_word_that_is_none_of_several_is_refused_by_name_and_kind():
    check_choice({"sum": 1, "max": 2}, error=DataError, normalize="sum", other="max")
    for wrong in ("mean", None, 1, ["sum"]):
        with pytest.raises(DataError) as caught:
            check_choice({"sum": 1, "max": 2}, error=DataError, normalize="sum", other=wrong)
        assert str(caught.value) == f"other is {wrong!r}; expected one of sum, max."
        assert (caught.value.field, caught.value.value) == ("other", wrong)


@pytest.mark.parametrize("value", [HUGE, -HUGE, 2**60, math.inf])
def test_a_huge_threshold_is_refused_by_name(value):
    with pytest.raises(PolicyError, match=r"thresholds\[0\] is .*expected a finite number") as caught:
        ExitPolicy.from_dict({**VALID["beem"], "thresholds": [value, 1.0]})
    assert caught.value.field == "thresholds[0]"


@pytest.mark.parametrize(
    "text",
    [
        "max-drop:1e999",
        "max-drop:" + "9" * 5000,
        "max-drop:nan",
        "MaxDrop(drop=1e999, sigmas=0.0)",
        f"MaxDrop(drop={HUGE}, sigmas=0.0)",
        "MaxDrop(" + "(" * 50_000 + ")" * 50_000 + ")",
        "MaxDrop(drop=" + "-" * 90_000 + "1)",
        "FinalLayerError(paired=False, a=" + "[" * 3000 + "]" * 3000 + ")",
        "MaxDrop(__import__('os').system('true'))",
        "MaxDrop(drop=[0.1])",
        "MaxDrop(drop={})",
        "SpeedUp(ratio=True)",
        "x" * 10**6,
        ["max-drop:0"],
        None,
        {"a": 1},
    ],
    ids=lambda text: str(text)[:40],
)
def test_targets_that_cannot_be_are_refused_at_once(text):
    start = time.process_time()
    with pytest.raises(EarlyExitError) as caught:
        parse_target(text)
    assert len(str(caught.value)) < 1000
    assert time.process_time() - start < 1


@pytest.mark.parametrize("value", [HUGE, -HUGE, math.nan, "0.1", None, True, [0.1]])
def test_numbers_of_targets_are_checked(value):
    with pytest.raises(CalibrationError, match="drop is") as caught:
        MaxDrop(value)
    assert caught.value.field == "drop"
    with pytest.raises(CalibrationError, match="ratio is"):
        SpeedUp(value)


def test_whole_and_real_numbers():
    assert [is_whole(value, 1, 5) for value in (1, 5, 0, 6, 1.0, True, "1", None)] == [True, True, *[False] * 6]
    assert [is_real(value, 0, 1) for value in (0, 0.5, 1, 1.5, -0.1, True, "0", None, math.nan)] == [True] * 3 + [False] * 6
    assert not any(is_real(value) for value in (HUGE, -HUGE, math.inf, 2**53 + 1))
    assert is_real(2**53)
    assert [are_layers(value) for value in ((1, 3), (), (3, 1), (0, 1), (1, 1025), [1], (1, 2.0), (1, 1))] == [
        True,
        True,
        *[False] * 6,
    ]


def test_json_comes_as_it_is():
    values = {"a": [1, 2.5, None, True, "é"], "b": {"c": {}}}
    assert parse_json(json.dumps(values), "f") == values
    assert parse_json(json.dumps(values).encode(), "f") == values


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"a": 1, "b": {"c": [0, NaN]}}', "b.c[1]"),
        ('{"a": -Infinity}', "a"),
        ('{"a": 1e999}', "a"),
        ('{"a": {"b": 9223372036854775808}}', "a.b"),
        ('{"a": ' + "9" * 100_000 + "}", "a"),
        ('{"a": 1, "a": 2}', "a"),
        ('{"x": [{"a": 1, "b": 1, "a": 1}]}', "a"),
        ('{"a": ' + "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1) + "}", "a"),
        ('{"a":' * (DEEPEST + 1) + "1" + "}" * (DEEPEST + 1), "a"),
    ],
    ids=lambda text: text[:30],
)
def test_json_that_is_refused_names_file_and_field(text, field):
    with pytest.raises(CheckpointError, match=r"folder/calibration\.json") as caught:
        parse_json(text, "folder/calibration.json")
    assert (caught.value.field, caught.value.path) == (field, "folder/calibration.json")
    assert len(str(caught.value)) < 500


def test_numbers_that_are_not_finite_can_be_let_through():
    values = parse_json('{"a": NaN, "b": 1e999, "c": ' + "9" * 5000 + ', "d": -' + "9" * 5000 + "}", "f", finite=False)
    assert math.isnan(values.pop("a"))
    assert values == {"b": math.inf, "c": math.inf, "d": -math.inf}


def test_a_file_that_is_too_large_is_not_parsed(monkeypatch):
    monkeypatch.setattr("hf_earlyexit.values.MOST_BYTES", 10)
    with pytest.raises(CheckpointError, match="expected at most 10"):
        parse_json('{"a": 123456}', "f")
    assert MOST_BYTES > 1 << 20


def test_the_sum_is_of_values_not_of_their_order():
    assert json_sum({"a": 1, "b": [2]}) == json_sum({"b": [2], "a": 1}) != json_sum({"a": 1, "b": [3]})
    labels = {"id2label": {number: str(number) for number in range(12)}}
    assert json_sum(labels) == json_sum(json.loads(json.dumps(labels)))  # "10" is before "2", and 2 before 10


def test_values_are_shown_short():
    assert shown([1, None]) == "[1, None]"
    assert len(shown("x" * 10**6)) < 300
    assert "bits" in shown(10**5000)
