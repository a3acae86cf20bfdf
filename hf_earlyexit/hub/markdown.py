"""Text from outside, made safe for a card: it stays text, and it tells nothing about the machine it came from."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from markupsafe import Markup

LEFT_OUT = "[left out]"
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
PATH = re.compile(r"(?<!\S)(?:file://)?(?:~|[A-Za-z]:)?[/\\][^\s/\\]+[/\\]\S*")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# An underscore between letters and a sign inside a word have no meaning in markdown and are better left readable.
SPECIAL = re.compile(r"[\\`*\[\]|~$#{}^!]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=:)/(?=/)|@")

BLOCK = re.compile(r"^(?:[-+](?=\s|$)|[-=]+(?=$)|\d+[.)](?=\s|$))")  # a list, a rule or a heading, at the start of a line


def escape(value: Any) -> Any:
    """Text as one line that no markdown reader takes for markup, links or mathematics; anything else unchanged.

    Args:
        value: a value of a template; `Markup` is taken for finished markdown.
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in value).split())
    line = re.sub(r"[&<>]", lambda match: ENTITIES[match[0]], line)
    line = SPECIAL.sub(lambda match: "&#" + str(ord(match[0])) + ";", line)
    return Markup(BLOCK.sub(_unblocked, line))


def _unblocked(start: re.Match[str]) -> str:
    return f"{start[0][:-1]}&#{ord(start[0][-1])};"


def without_private(text: str) -> str:
    """The text without tokens, absolute paths, the home folder and this machine's name."""
    text = PATH.sub(LEFT_OUT, TOKEN.sub(LEFT_OUT, text))
    for secret in (str(Path.home()), socket.gethostname()):
        if len(secret) > 3:
            text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", LEFT_OUT, text)
    return text


def hub_id(name: str | None) -> str | None:
    """`name` if it is a repository on the Hub as far as one can tell offline; `None` for a local path or anything else."""
    if name is None:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if TOKEN.search(name) or Path(name).exists() else name
