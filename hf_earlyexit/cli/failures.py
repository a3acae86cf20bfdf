"""How a command ends when it cannot go on: in words where what was given is at fault, with a traceback where we are."""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

from ..errors import EarlyExitError, PermitsEverything, UnknownNameError

EXTRAS = {
    "accelerate": "train",
    "datasets": "train",
    "evaluate": "train",
    "sklearn": "train",
    "scipy": "train",
    "pandas": "train",
    "pyarrow": "train",
    "jinja2": "report",
    "matplotlib": "report",
    "PIL": "caption",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "fastapi": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "ray": "ray",
}
MISTAKE, INTERRUPTED, READER_GONE = 2, 130, 141  # the last two as a shell says of SIGINT and SIGPIPE


class End(NamedTuple):
    """The exit status of a command, and what it says on standard error."""

    status: int
    messages: tuple[str, ...] = ()


def end_of(error: BaseException, command: str) -> End | None:
    """How a command ends after an error; `None` for a bug, which deserves its traceback."""
    if isinstance(error, KeyboardInterrupt):
        return End(INTERRUPTED, (f"hf-earlyexit {command}: interrupted.",))
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that nothing is said when Python ends
        return End(READER_GONE)
    message = _message(error)
    if message is not None:
        name = "hf-earlyexit" if isinstance(error, UnknownNameError) else f"hf-earlyexit {command}"
        return End(MISTAKE, (f"{name}: {message}",))
    if isinstance(error, Exception):
        error.add_note("This is a bug in hf_earlyexit; please report it with what `hf-earlyexit env` prints.")
    return None


def _message(error: BaseException) -> str | None:
    if isinstance(error, EarlyExitError):
        return str(error)
    if isinstance(error, PermitsEverything):
        return f"{error} Nothing was written. If you meant points, write --target {error.instead}."
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be loaded
        first = str(error).split("\n")[0] or "there is no memory left"
        return f"{first} Use a smaller --max_batch_tokens or --per_device_train_batch_size, or another --device."
    if isinstance(error, OSError):
        text = " ".join(str(error).split())  # transformers' are several lines long
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text or type(error).__name__
    if type(error).__module__.startswith("huggingface_hub"):
        return " ".join(str(error).split())
    return None


def _missing(error: ImportError) -> str | None:
    """Which extra holds what is missing; `None` for what no extra holds."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:  # such as transformers' own words about accelerate
        named = [name for name in EXTRAS if name in str(error)]
        module = named[0] if named and not isinstance(error, ModuleNotFoundError) else ""
    if not module:
        return None
    return f'{module} is missing, which this needs; run: pip install "hf_earlyexit[{EXTRAS[module]}]"'
