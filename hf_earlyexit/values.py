"""Values from files and callers: JSON that is read with care, numbers that are what they should be."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, TypeVar

from .errors import CheckpointError, EarlyExitError, UsageError

Error = TypeVar("Error", bound=EarlyExitError)

MOST_LAYERS = 1024
MOST_BYTES = 1 << 28  # of a JSON file; 1,024 exits with a curve of 400 points take 10 MB
DEEPEST = 64  # nested lists and objects
LARGEST_EXACT = 1 << 53  # above it a double no longer holds every whole number
LONGEST_SHOWN = 200
MOST_DIGITS = 400  # of a number in JSON; a double's largest takes 309


def is_whole(value: Any, lowest: int = 0, highest: int = LARGEST_EXACT) -> bool:
    """Whether a value is a whole number in a range, and no boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest


def is_real(value: Any, lowest: float = -math.inf, highest: float = math.inf) -> bool:
    """Whether a value is a finite number in a range, and no boolean; whole ones at most 2^53 in size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if isinstance(value, int) and abs(value) > LARGEST_EXACT:
        return False
    return math.isfinite(value) and lowest <= value <= highest


def unexpected(name: str, value: Any, expected: str, error: type[Error] = UsageError) -> Error:  # type: ignore[assignment]
    """The error for an argument or field that cannot be: its name, its value and what was expected."""
    return error(f"{name} is {shown(value)}; expected {expected}.", field=name, value=value)


def check_flags(**flags: Any) -> None:
    """Refuse what is neither true nor false; `None` passes, as what a caller may leave out.

    Raises:
        UsageError: naming the first; a string, even "false", would count as true.
    """
    for name, value in flags.items():
        if value is not None and not isinstance(value, bool):
            raise unexpected(name, value, "True or False")


def check_whole(
    lowest: int = 0, highest: int = LARGEST_EXACT, /, error: type[EarlyExitError] = UsageError, **numbers: Any
) -> None:
    """Refuse what is no whole number in a range.

    Raises:
        EarlyExitError: of the kind that is named, naming the first.
    """
    for name, value in numbers.items():
        if not is_whole(value, lowest, highest):
            most = "" if highest == LARGEST_EXACT else f" to {highest}"
            raise unexpected(name, value, f"a whole number from {lowest}{most}", error)


def check_real(
    lowest: float, highest: float = math.inf, /, error: type[EarlyExitError] = UsageError, **numbers: Any
) -> None:
    """Refuse what is no finite number in a range, both ends included.

    Raises:
        EarlyExitError: of the kind that is named, naming the first.
    """
    for name, value in numbers.items():
        if not is_real(value, lowest, highest):
            most = "" if highest == math.inf else f" to {highest:g}"
            raise unexpected(name, value, f"a finite number from {lowest:g}{most}", error)


def check_choice(choices: Iterable[str], /, error: type[EarlyExitError] = UsageError, **words: Any) -> None:
    """Refuse what is none of several words.

    Raises:
        EarlyExitError: of the kind that is named, naming the first.
    """
    known = tuple(choices)
    for name, value in words.items():
        if not isinstance(value, str) or value not in known:
            raise unexpected(name, value, f"one of {', '.join(known)}", error)


def plain(value: Any) -> Any:
    """A number of NumPy or torch as Python's own, an array or tensor as lists of these; anything else as it is."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def are_layers(values: Any) -> bool:
    """Whether these are layers' numbers, whole from 1 to 1,024 and ascending, in a tuple."""
    whole = isinstance(values, tuple) and all(is_whole(value, 1, MOST_LAYERS) for value in values)
    return whole and all(low < high for low, high in pairwise(values))


def check_layers(exit_layers: Any, error: type[EarlyExitError]) -> None:
    """Refuse what are no layers' numbers, as `are_layers` has them."""
    if not are_layers(exit_layers):
        raise unexpected("exit_layers", exit_layers, f"layer numbers from 1 to {MOST_LAYERS}, ascending", error)


def shown(value: Any) -> str:
    """A value as errors show it: its `repr`, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = f"a whole number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ..."


def parse_json(text: str | bytes, name: Any, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a text.

    Args:
        text: as it was read; bytes are UTF-8.
        name: the file it is from, for errors.
        finite: refuse nan, infinities and whole numbers of more than 64 bits.

    Raises:
        CheckpointError: naming the file, and the field where one is at fault: for anything but an object, a name that comes
            twice, more than 64 levels, or a number that is not finite.
    """
    if len(text) > MOST_BYTES:
        raise CheckpointError(f"{name} has {len(text):,} bytes; expected at most {MOST_BYTES:,}.", path=name)
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        values = json.loads(text, object_pairs_hook=lambda pairs: _once(pairs, name), parse_int=_whole)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{name} is not JSON in UTF-8 ({error}); make or download it again.", path=name) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{name} holds a JSON {type(values).__name__}; expected an object.", path=name)
    _check(values, name, finite)
    return values


def json_sum(values: Any) -> str:
    """SHA-256 of JSON values, whatever the order of their keys; a file holds numbers as keys, such as labels, as words."""
    stored = json.loads(json.dumps(values))
    return hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else math.copysign(math.inf, -1 if digits[0] == "-" else 1)


def _once(pairs: list[tuple[str, Any]], name: Any) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise CheckpointError(f"{name} has {twice!r} twice in one object; which one counts?", field=twice, path=name)
    return values


def _check(values: dict[str, Any], name: Any, finite: bool) -> None:
    """Refuse what lies too deep, and numbers that are not finite; no recursion."""
    level: list[tuple[str, Any]] = list(values.items())
    for _ in range(DEEPEST):
        below: list[tuple[str, Any]] = []
        for field, value in level:
            if isinstance(value, dict):
                below += [(f"{field}.{key}", inner) for key, inner in value.items()]
            elif isinstance(value, list):
                below += [(f"{field}[{index}]", inner) for index, inner in enumerate(value)]
            elif finite and _is_too_large(value):
                raise CheckpointError(
                    f"{field} in {name} is {str(value)[:40]}; expected a finite number of at most 64 bits.",
                    field=field,
                    value=value,
                    path=name,
                )
        level = below
        if not level:
            return
    field = level[0][0]
    raise CheckpointError(
        f"{field[:80]} ... in {name} lies {DEEPEST} levels deep; nothing that this library reads does.",
        field=field.partition(".")[0].partition("[")[0],
        path=name,
    )


def _is_too_large(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return isinstance(value, int) and abs(value) >= 1 << 63
