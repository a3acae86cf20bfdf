"""What every command hands back, and how it is printed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, NamedTuple


class CommandResult(NamedTuple):
    """What a command found: plain values for `--json`, and the same in words.

    Where answers come one by one, `lines` gives them, words are not needed, and `values` are complete once all have come.
    `status` is that of the program where all went well.
    """

    values: dict[str, Any]
    text: str = ""
    lines: Iterator[dict[str, Any]] | None = None
    status: int = 0

    def printed(self, as_json: bool) -> str:
        """One line of JSON, in which a number that is not finite is null; or the words."""
        if not as_json:
            return self.text
        if self.lines is None:
            return as_line(self.values)
        answers = list(self.lines)
        return as_line({**self.values, "answers": answers})

    def print_lines(self) -> None:
        """Each of the answers that come one by one, as it comes, as a line of JSON."""
        for line in self.lines or ():
            print(as_line(line), flush=True)


def as_line(values: dict[str, Any]) -> str:
    """Values as one line of JSON, in which a number that is not finite is null, and what JSON does not know is a text."""
    return json.dumps(finite(values), ensure_ascii=False, allow_nan=False, default=str)


def finite(value: Any) -> Any:
    """The same, with `None` in place of numbers that are not finite."""
    if isinstance(value, dict):
        return {str(name): finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
