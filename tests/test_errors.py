import inspect
from pathlib import Path

import pytest

from hf_earlyexit import errors

CLASSES = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, Exception) and not issubclass(kind, Warning)
]
KINDS = [kind for kind in CLASSES if kind is not errors.EarlyExitError]


def test_there_are_few_kinds_and_each_is_a_value_error_of_our_own():
    assert 1 <= len(KINDS) <= 8
    for kind in KINDS:
        assert kind.__bases__ == (errors.EarlyExitError,)
    assert errors.EarlyExitError.__bases__ == (ValueError,)


@pytest.mark.parametrize("kind", CLASSES)
def test_every_kind_tells_message_field_value_and_path(kind):
    error = kind("threshold is 2; expected at most 1", field="threshold", value=2, path=Path("some") / "config.json")
    assert str(error) == "threshold is 2; expected at most 1"
    assert (error.field, error.value) == ("threshold", 2)
    assert error.path == str(Path("some") / "config.json")


@pytest.mark.parametrize("kind", CLASSES)
def test_what_is_not_known_is_none(kind):
    error = kind("no more is known")
    assert (error.field, error.value, error.path) == (None, None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_says_what_it_is_for(kind):
    assert (kind.__doc__ or "").rstrip().endswith(".")
