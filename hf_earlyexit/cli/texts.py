"""Texts for models that write, from files: to learn from, or to write on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset

from ..data.formats import STDIN
from ..errors import DataError, UsageError
from ..modeling.protocol import TorchExitWriter
from ..values import check_whole
from .arguments import FileArguments, given
from .incoming import incoming
from .rows import reading, require_column, rows_as_given, texts_of, with_inputs

NEW_TOKENS = 64  # of language models
BATCH = 8
WRITERS_ONLY = ("lossless", "chat", "max_new_tokens", "batch_size")


class WritingTask(NamedTuple):
    """What a model that writes is given by a command.

    Attributes:
        rows: with the columns that they came with.
        prompts: of a language model, or rows with pictures.
        references: texts for each, or `None`.
        parts: the model's tokenizer, and a captioner's image processor, by name.
        generation: for `generate`.
        batch_size: rows in a batch.
    """

    rows: Dataset
    prompts: Any
    references: list[Any] | None
    parts: dict[str, Any]
    generation: dict[str, Any]
    batch_size: int


def writes(model: object) -> bool:
    """Whether a model is a captioner or language model."""
    from ..generation.token_exits import ModelThatWrites

    return isinstance(model, ModelThatWrites)


def text_rows(args: FileArguments, place: str, split: str | None, default: str) -> Dataset:
    """Rows with texts or token ids: as in `read_rows`, and of a text file each line.

    Args:
        args: flags.
        place, split, default: as in `read_rows`.

    Raises:
        DataError: for rows that cannot be read, naming the first.
    """
    return with_inputs(args, _texts_as_given(args, place, split, default), place, images=False)


def _texts_as_given(args: FileArguments, place: str, split: str | None, default: str) -> Dataset:
    if not (place == STDIN or Path(place).is_file()) or reading(args).format_of(place) not in (None, "text"):
        return rows_as_given(args, place, split, default)
    if split not in (None, "train"):
        raise DataError(
            f"{place} is a text file, which has no split {split!r}; leave it out. --max_rows takes the first lines.",
            field="split",
            value=split,
        )
    source = incoming(args, place, None)
    lines = [source.text(row) for row in source.rows]
    if not lines:
        raise DataError(f"{place} has no rows here; expected at least one.", path=place)
    return Dataset.from_dict({"text": lines})


def single_texts(texts: list[Any]) -> list[str]:
    """The same texts.

    Raises:
        UsageError: for pairs of texts.
    """
    if texts and not isinstance(texts[0], str):
        raise UsageError("The rows hold pairs of texts; name the column of one with --text_column.", field="text_column")
    return texts


def as_prompts(texts: list[Any], chat: bool) -> list[Any]:
    """Texts as prompts: as they are, or each as what a user says."""
    texts = single_texts(texts)
    return [[{"role": "user", "content": text}] for text in texts] if chat else texts


def refuse(args: Any, names: Sequence[str], whose: str) -> None:
    """Refuse flags that a model has no use for, where they are given.

    Raises:
        UsageError: naming the flag.
    """
    defaults = {field.name: field.default for field in fields(args)}
    for name in names:
        value = getattr(args, name)
        if value != defaults[name]:
            raise UsageError(f"--{name} is for {whose}; leave it out.", field=name, value=value)


def refuse_flags_of_writers(args: Any, more: Sequence[str] = ()) -> None:
    """Refuse what a classifier has no use for.

    Raises:
        UsageError: naming the flag.
    """
    refuse(args, (*WRITERS_ONLY, *more), "captioners and language models, and this is a classifier")


def writing_task_of(args: Any, model: TorchExitWriter, default: str, of_classifiers: Sequence[str]) -> WritingTask:
    """Read what a captioner or language model is to write on from.

    Args:
        args: flags of the command.
        model: that has been loaded.
        default: the split to read where none is named.
        of_classifiers: flags to refuse.

    Raises:
        UsageError: for flags that do not fit the model.
        DataError: for rows that cannot be read.
    """
    from ..generation.language_model import EarlyExitLanguageModel
    from .loading import load_input_parts, reading_parts

    refuse(args, of_classifiers, "classifiers, and this model writes")
    check_whole(1, **given(args, "max_new_tokens", "batch_size"))
    speaks = isinstance(model, EarlyExitLanguageModel)
    if not speaks:
        refuse(args, ("chat",), "language models, and this is a captioner")
    if args.dataset is None:
        raise UsageError(f"Name {'prompts' if speaks else 'pictures'} to choose on with --dataset.", field="dataset")
    if speaks:
        rows = _texts_as_given(args, args.dataset, args.split, default)
    else:
        rows = rows_as_given(args, args.dataset, args.split, default, images=True)
    prompts: Any = with_inputs(args, rows, args.dataset, images=not speaks)
    if speaks and "input_ids" not in prompts.column_names:
        prompts = as_prompts(texts_of(prompts), args.chat)
    generation: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False} if speaks else {}
    if args.lossless and not speaks:
        generation = {"do_sample": False, "num_beams": 1}  # drafts are of greedy captions, whatever the config says
    if args.max_new_tokens is not None:
        generation["max_new_tokens"] = args.max_new_tokens
    references = None if args.label_column is None else _references(rows, args.label_column)
    parts = reading_parts(args.model, model) if speaks else load_input_parts(args.model)
    return WritingTask(rows, prompts, references, parts, generation, args.batch_size or BATCH)


def _references(rows: Dataset, column: str) -> list[Any]:
    require_column(rows, column, "references", "label_column")
    references = rows[column][:]
    for row, one in enumerate(references):
        if not isinstance(one, str) and not (isinstance(one, list) and all(isinstance(text, str) for text in one)):
            raise DataError(
                f"Row {row} of {column!r} holds {type(one).__name__}; expected a reference, or a list of references.",
                field="label_column",
                value=row,
            )
    return list(references)
