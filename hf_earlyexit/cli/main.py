"""The command line: `hf-earlyexit COMMAND --config recipe.yaml --flag value`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module

from transformers.utils import logging

from ..errors import EarlyExitError, UnknownNameError
from ..registry import Registry
from .parsing import parse_arguments

COMMANDS: Registry[str] = Registry("command")
for _name, _help in (
    ("train", "fine-tune a model with exits and keep a trace of held-back rows"),
    ("consistentee", "train exits and gates by reward, in phases, and keep a trace of held-back rows"),
    ("calibrate", "choose thresholds on the held-back rows and put them into the model"),
    ("evaluate", "quality, layers and measured time on a labelled data set"),
    ("explain", "tell why a text leaves where it does"),
    ("report", "compare all policies on held-back rows in one HTML file"),
    ("env", "print versions, threads and devices"),
    ("predict", "classify texts, each with the layer it left after"),
    ("caption", "caption pictures, each word with the layer it was decided at"),
    ("push", "push a model with all that belongs to it and a card to the Hub"),
    ("export", "write a model as ONNX files that skip layers, also in 8 bits"),
    ("bench", "measure what early exit brings in time, beside the alternatives"),
):
    COMMANDS.register(_name)(_help)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: words after the program's name; `sys.argv` by default.

    Returns:
        0 if it worked, 2 for a mistake in what was given, which is told in one line.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0 if words else 2
    try:
        COMMANDS.get(words[0])
        command = import_module(f".{words[0]}", __package__)
        logging.set_verbosity_warning()
        rest = getattr(command, "REST", None)
        objects, as_json = parse_arguments(command.ARGUMENTS, words[1:], words[0], command.__doc__, rest)
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # whatever else prints, such as a Trainer
            answer = command.run(*objects)
        if told := answer.printed(as_json):
            print(told)
    except ModuleNotFoundError as error:
        print(
            f'hf-earlyexit {words[0]}: {error}; run: pip install "hf_earlyexit[train,report,caption,onnx]"', file=sys.stderr
        )
        return 2
    except UnknownNameError as error:
        print(f"hf-earlyexit: {error}", file=sys.stderr)
        return 2
    except (EarlyExitError, OSError) as error:
        print(f"hf-earlyexit {words[0]}: {error}", file=sys.stderr)
        return 2
    return 0


def _overview() -> str:
    lines = [f"  {name:12s} {COMMANDS.get(name)}" for name in COMMANDS.names()]
    return "\n".join(
        ["usage: hf-earlyexit COMMAND [MODEL] [--config recipe.yaml] [--flag value ...]", "", *lines, "",
         "hf-earlyexit COMMAND --help tells every flag."]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
