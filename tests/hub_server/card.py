"""The metadata at the head of a model card, read without a YAML library."""

import json
import re
from typing import Any


def front_matter(text: str) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a card and what is wrong with it.

    Reads the part of YAML that cards are made of: keys at the margin with a scalar, or with a list of scalars. Deeper
    values are accepted, but left out.
    """
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}, []
    if "---" not in (line.rstrip() for line in lines[1:]):
        return {}, ["the metadata has no closing ---"]
    metadata: dict[str, Any] = {}
    errors, key, end = [], "", [line.rstrip() for line in lines].index("---", 1)
    for number, line in enumerate(lines[1:end], start=2):
        item, pair = re.fullmatch(r"\s*- +(.*)", line), re.fullmatch(r"([\w.-]+):(?: +(.*))?", line.rstrip())
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            if pair:
                key = pair[1]
                metadata[key] = scalar(pair[2]) if pair[2] else []
            elif item and isinstance(metadata.get(key), list) and not re.match(r"[\w.-]+:( |$)", item[1]):
                metadata[key].append(scalar(item[1]))
            elif key and (item or line.startswith("  ")):
                metadata.pop(key, None)
            else:
                raise ValueError("neither a key with a value nor an item of a list")
        except ValueError as error:
            errors.append(f"line {number} of the metadata, {line!r}: {error}")
    return metadata, errors


def scalar(text: str) -> Any:
    """A value as YAML reads it, if it is on one line and not a mapping."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        if len(text) < 2 or text[-1] != text[0]:
            raise ValueError("the quote is not closed")
        return text[1:-1]
    text = text.split(" #")[0].rstrip()
    if text[:1] == "[":
        if text[-1] != "]":
            raise ValueError("the list is not closed")
        return [scalar(one) for one in text[1:-1].split(",") if one.strip()]
    if ": " in text or text.endswith(":"):
        raise ValueError("a text with a colon needs quotes")
    try:
        return json.loads(text)
    except ValueError:
        return text
