"""Flags over YAML over defaults, for the dataclasses of a command."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import EarlyExitError, UsageError


def _module_of_transformers(name: str) -> Any:
    """A module of transformers alone, where it needs no other: the package takes a second to import, `--help` a fifth."""
    package = find_spec("transformers")
    if "transformers" not in sys.modules and package is not None and package.origin is not None:
        spec = spec_from_file_location(f"hf_earlyexit.cli.{name}", Path(package.origin).with_name(f"{name}.py"))
        if spec is not None and spec.loader is not None:
            module = module_from_spec(spec)
            try:
                spec.loader.exec_module(module)
                return module
            except (ImportError, OSError):  # it imports others of its package, or stands elsewhere
                pass
    return import_module(f"transformers.{name}")


if TYPE_CHECKING:
    from transformers import HfArgumentParser
    from transformers.hf_argparser import string_to_bool
else:
    _argparser = _module_of_transformers("hf_argparser")
    HfArgumentParser, string_to_bool = _argparser.HfArgumentParser, _argparser.string_to_bool


class _Parser(HfArgumentParser):
    """Says what is wrong as every other part of the library does."""

    def error(self, message: str) -> Any:
        raise UsageError(f"{message[:1].upper()}{message[1:]}. See {self.prog} --help.")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults of every flag; the examples above them as they were written."""


def parse_arguments(
    classes: Sequence[Any],
    words: Sequence[str],
    command: str,
    about: str | None,
    rest: str | None = None,
    more: str | None = None,
) -> tuple[tuple[Any, ...], bool]:
    """One object for each dataclass, and whether JSON is asked for.

    Args:
        classes: dataclasses whose fields are the flags.
        words: the command line after the command; first words that are no flags are the model, or what the first dataclass
            names in `WORDS`; `--config FILE` names a YAML file of the same fields.
        rest: the flag that words between those and the first flag are for, such as "--images".
        command: for the usage line.
        about: shown by `--help` before the flags.
        more: shown after them.

    Raises:
        UsageError: for a recipe that cannot be read, or that holds a name no flag has; and for values that are refused.
    """
    parser = _Parser(classes, prog=f"hf-earlyexit {command}", description=about, epilog=more, formatter_class=_Help)
    parser.add_argument("--config", help="a YAML file of these flags; flags on the command line win")
    parser.add_argument(
        "--json", type=string_to_bool, default=False, const=True, nargs="?", help="print one JSON object and nothing else"
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the library a mistake was found")
    words = _with_flags(list(words), getattr(classes[0], "WORDS", ("model",)), rest)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words[:-1]:
        _use_as_defaults(parser, words[words.index("--config") + 1])
    try:
        *objects, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except EarlyExitError:
        raise
    except (ValueError, TypeError, RuntimeError, NotImplementedError, PackageNotFoundError) as error:
        # settings that refuse each other or this machine, such as TrainingArguments' --bf16 where there is no GPU
        raise UsageError(" ".join(str(error).split())) from error
    if unknown:
        raise _unknown_flag(parser, unknown[0])
    *filled, common = objects
    return tuple(filled), common.json


def _with_flags(words: list[str], names: Sequence[str], rest: str | None) -> list[str]:
    plain = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    named = [part for name, word in zip(names, words[:plain], strict=False) for part in (f"--{name}", word)]
    more = words[len(names) :] if plain > len(names) else words[plain:]
    return [*named, rest, *more] if rest is not None and plain > len(names) else [*named, *more]


def _unknown_flag(parser: HfArgumentParser, word: str) -> UsageError:
    near = difflib.get_close_matches(word.split("=")[0], parser._option_string_actions, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" See {parser.prog} --help."
    return UsageError(f"Unknown word {word!r}.{hint}", field=word)


def _use_as_defaults(parser: HfArgumentParser, path: str) -> None:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML: {error}", field="config", path=path) from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path} holds {type(recipe).__name__}; expected `name: value` lines.", field="config", path=path)
    actions = {action.dest: action for action in parser._actions}
    for name, value in recipe.items():
        if name not in actions:
            near = difflib.get_close_matches(str(name), actions, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UsageError(f"{path} has an unknown name {name!r}.{hint}", field=str(name), path=path)
        actions[name].required = False
        # argparse reads text as it reads the command line, so "3e-5" and 0.1 both become what the flag wants
        if isinstance(value, dict) and actions[name].type is str:
            value = json.dumps(value)
        actions[name].default = str(value) if isinstance(value, (int, float)) else value
