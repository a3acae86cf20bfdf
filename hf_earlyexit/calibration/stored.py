"""What a stored calibration must be before anything is made of it: every field, and figures that fit each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import CheckpointError
from ..policies.base import ExitPolicy
from ..values import MOST_LAYERS, is_real, is_whole, unexpected
from .replay import ExitReport

SUM = "sha256"
CLOSE = 1e-6
SEEDS = 1 << 63

Check = Callable[[Any], bool]
WORDS: dict[str, tuple[Check, str]] = {
    "text": (lambda value: isinstance(value, str), "a text"),
    "texts": (lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value), "a list of texts"),
    "object": (lambda value: isinstance(value, dict), "an object"),
    "object or null": (lambda value: value is None or isinstance(value, dict), "an object, or null"),
    "objects": (lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value), "a list of objects"),
    "versions": (
        lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
        "an object of texts",
    ),
    "number": (is_real, "a finite number"),
    "number or null": (lambda value: value is None or is_real(value), "a finite number, or null"),
    "positive": (lambda value: is_real(value, 1e-12), "a number above 0"),
    "error": (lambda value: is_real(value, 0), "a number of at least 0"),
    "error or null": (lambda value: value is None or is_real(value, 0), "a number of at least 0, or null"),
    "share": (lambda value: is_real(value, 0, 1), "a number from 0 to 1"),
    "share or null": (lambda value: value is None or is_real(value, 0, 1), "a number from 0 to 1, or null"),
    "count": (lambda value: is_whole(value), "a whole number of at least 0"),
    "rows": (lambda value: is_whole(value, 1), "a whole number above 0"),
    "layer": (lambda value: is_whole(value, 1, MOST_LAYERS), f"a whole number from 1 to {MOST_LAYERS}"),
    "seed": (lambda value: is_whole(value, -SEEDS, SEEDS), "a whole number"),
}
FIELDS = {
    "target": "text",
    "metric": "text",
    "quality": "number",
    "full_quality": "number",
    "standard_error": "error",
    "mean_layers": "positive",
    "mean_cost": "positive",
    "layer_speed_up": "positive",
    "exits": "objects",
    "num_rows": "rows",
    "num_learning_rows": "count",
    "seed": "seed",
    "split": "text",
    "dtype": "text",
    "fingerprint": "text",
    "versions": "versions",
    "expected": "object or null",
    "promise": "object or null",
    "notes": "texts",
}
EXIT_FIELDS = {
    "layer": "layer",
    "threshold": "number or null",
    "share": "share",
    "quality": "number",
    "quality_of_leavers": "number or null",
    "last_quality_of_leavers": "number or null",
}

CLASS_FIELDS = {
    "label": "count",
    "num_rows": "count",
    "f1": "share",
    "full_f1": "share",
    "recall": "share or null",
    "full_recall": "share or null",
}


def check_fields(values: dict[str, Any], fields: dict[str, str], place: str = "") -> None:
    """Refuse a field that is missing or not what it should be.

    Args:
        values: as JSON has them.
        fields: for each, a key of `WORDS`.
        place: where the values stand, for errors, such as "exits[0].".

    Raises:
        CheckpointError: naming field, value and what was expected.
    """
    for name, kind in fields.items():
        if name not in values:
            raise CheckpointError(f"{place}{name} is missing.", field=place + name)
        check, expected = WORDS[kind]
        if not check(values[name]):
            raise wrong(place + name, values[name], expected)


def check_known(values: dict[str, Any], known: Iterable[str], place: str = "") -> None:
    """Refuse a field that nobody knows.

    Raises:
        CheckpointError: naming it.
    """
    for name in values.keys() - set(known):
        raise CheckpointError(f"{place}{name} is no field of a calibration of this format.", field=place + name)


def check_calibration(values: dict[str, Any], policy: ExitPolicy) -> None:
    """Refuse the JSON values of a calibration that are missing, of the wrong type, or do not fit each other.

    Args:
        values: as `to_dict` gives them.
        policy: that of the values.

    Raises:
        CheckpointError: naming field, value and what was expected.
    """
    check_fields(values, FIELDS)
    exits = values["exits"]
    if len(exits) != policy.num_exits:
        raise wrong("exits", f"{len(exits)} reports", f"{policy.num_exits}, one for each exit of the policy")
    for index, (report, threshold) in enumerate(zip(exits, (*policy.thresholds, None), strict=True)):
        place = f"exits[{index}]."
        check_known(report, (field.name for field in dataclasses.fields(ExitReport)), place)
        check_fields(report, EXIT_FIELDS, place)
        if report["threshold"] != threshold:
            raise wrong(f"{place}threshold", report["threshold"], f"{threshold!r}, the policy's threshold there")
    if "classes" in values:
        _check_classes(values)
    layers = [report["layer"] for report in exits]
    if layers != sorted(set(layers)) or (policy.exit_layers is not None and layers != list(policy.exit_layers)):
        expected = "numbers that ascend" if policy.exit_layers is None else f"{list(policy.exit_layers)}, as in the policy"
        raise wrong("exits", f"those of layers {layers}", expected)
    _close("exits", sum(report["share"] for report in exits), 1.0, "shares that add up to 1")
    mean = sum(report["share"] * report["layer"] for report in exits)
    _close("mean_layers", values["mean_layers"], mean, "the mean of the exits' layers by their shares")
    _close("layer_speed_up", values["layer_speed_up"], layers[-1] / mean, "the number of layers over their mean")
    check_curve(values.get("curve"), policy.num_exits - 1)


def _check_classes(values: dict[str, Any]) -> None:
    check_fields(values, {"classes": "objects"})
    for index, report in enumerate(values["classes"]):
        place = f"classes[{index}]."
        check_known(report, CLASS_FIELDS, place)
        check_fields(report, CLASS_FIELDS, place)
        if report["label"] != index:
            raise wrong(f"{place}label", report["label"], f"{index}: every class in its place")


def check_curve(curve: Any, count: int) -> None:
    """Refuse a curve with a point that is not cost, quality and a threshold for each exit but the last.

    Args:
        curve: as JSON has it.
        count: of thresholds.
    """
    if not isinstance(curve, list) or not curve:
        raise wrong("curve", curve, "a list of points, the full model's first")
    for index, point in enumerate(curve):
        if not isinstance(point, list) or len(point) != 3:
            raise wrong(f"curve[{index}]", point, "mean cost, quality and thresholds")
        check_fields(dict(zip(("0", "1"), point, strict=False)), {"0": "positive", "1": "number"}, f"curve[{index}].")
        check_thresholds(point[2], count, f"curve[{index}].2")


def check_thresholds(thresholds: Any, count: int, field: str) -> None:
    """Refuse anything but a list of `count` thresholds."""
    if not isinstance(thresholds, list) or len(thresholds) != count:
        raise wrong(field, thresholds, f"{count} thresholds, one for each exit but the last")
    if not all(value is None or is_real(value) for value in thresholds):
        raise wrong(field, thresholds, "finite numbers, or null")


def wrong(field: str, value: Any, expected: str) -> CheckpointError:
    """The error that names a field, its value and what was expected."""
    return unexpected(field, value, expected, CheckpointError)


def _close(field: str, value: float, expected: float, words: str) -> None:
    if abs(value - expected) > CLOSE * max(1.0, abs(expected)):
        raise wrong(field, value, f"{expected:.6f}: {words}")
