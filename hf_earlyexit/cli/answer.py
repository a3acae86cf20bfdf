"""What every command hands back, and how it is printed."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What a command found: plain values for `--json`, and the same in words."""

    values: dict[str, Any]
    text: str

    def printed(self, as_json: bool) -> str:
        """One line of JSON, in which a number that is not finite is null; or the words."""
        if not as_json:
            return self.text
        return json.dumps(_finite(self.values), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
