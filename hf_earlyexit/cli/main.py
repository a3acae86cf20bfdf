"""The command line: `hf-earlyexit COMMAND --config recipe.yaml --flag value`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module
from importlib.metadata import version
from types import ModuleType

from ..errors import PermitsEverything
from ..registry import Registry
from .failures import end_of

COMMANDS: Registry[str] = Registry("command")
for _name, _help in (
    ("train", "fine-tune a model with exits and keep a trace of held-back rows"),
    ("consistentee", "train exits and gates by reward, in phases, and keep a trace of held-back rows"),
    ("calibrate", "choose thresholds on the held-back rows and put them into the model"),
    ("recalibrate", "choose thresholds anew on rows of today and keep them beside the old ones"),
    ("evaluate", "quality, layers and measured time on a labelled data set"),
    ("explain", "tell why a text leaves where it does"),
    ("report", "compare all policies on held-back rows in one HTML file"),
    ("env", "print versions, threads and devices"),
    ("predict", "classify texts, each with the layer it left after"),
    ("serve", "answer over HTTP, on this machine unless told otherwise"),
    ("monitor", "tell what a monitor saw; ends with status 1 after an alarm"),
    ("generate", "write on from prompts, each token with the layer it left after"),
    ("caption", "caption pictures, each word with the layer it was decided at"),
    ("push", "push a model with all that belongs to it and a card to the Hub"),
    ("export", "write a model as ONNX files that skip layers, also in 8 bits"),
    ("bench", "measure what early exit brings in time, beside the alternatives"),
):
    COMMANDS.register(_name)(_help)

HELP, HELP_ALL = ("-h", "--help"), "--help_all"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; `sys.argv` by default.

    Returns:
        0 if it worked, 1 if `monitor` found an alarm; 2 for a mistake in what was given, which is told in one message; 130
        if it was interrupted; 141 if whoever read its output has gone. Any other error is a bug, and is raised.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in HELP:
        print(_overview())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"hf-earlyexit {version('hf_earlyexit')}")
        return 0
    name = words[0]
    try:
        COMMANDS.get(name)
        return _run(name, words[1:])
    except BaseException as error:
        if "--traceback" in words:
            raise
        end = end_of(error, name)
        if end is None:
            raise
        print(*end.messages, sep="\n", end="\n" if end.messages else "", file=sys.stderr)
        return end.status


def _run(name: str, words: list[str]) -> int:
    from .parsing import parse_arguments  # brings transformers' parser with it, which the overview does not need

    command = import_module(f".{name}", __package__)
    classes = flags_of(command, all_of_them=not set(HELP) & set(words))
    words = [HELP[1] if word == HELP_ALL else word for word in words]
    objects, as_json = parse_arguments(
        classes, words, name, command.__doc__, getattr(command, "REST", None), getattr(command, "MORE", None)
    )
    with redirect_stdout(sys.stderr) if as_json else nullcontext(), warnings.catch_warnings():  # a Trainer prints, too
        warnings.simplefilter("error", PermitsEverything)  # nobody reads a warning before the thresholds are written
        result = command.run(*objects)
        text = result.printed(as_json) if as_json or result.lines is None else None
    if text is None:
        result.print_lines()
    elif text:
        print(text, flush=True)
    return int(result.status)


def flags_of(command: ModuleType, all_of_them: bool = True) -> tuple[type, ...]:
    """The dataclasses whose fields are a command's flags.

    Args:
        command: its module.
        all_of_them: with what it takes beside its own, which costs seconds to import, and pages to list.
    """
    more = getattr(command, "more_arguments", None)
    return (*command.ARGUMENTS, *more()) if more is not None and all_of_them else tuple(command.ARGUMENTS)


def _overview() -> str:
    lines = [f"  {name:12s} {COMMANDS.get(name)}" for name in COMMANDS.names()]
    return "\n".join(
        ["usage: hf-earlyexit COMMAND [MODEL] [--config recipe.yaml] [--flag value ...]", "", *lines, "",
         "hf-earlyexit COMMAND --help tells every flag; hf-earlyexit --version, the version."]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
