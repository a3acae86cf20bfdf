"""Texts for models that write, from files: to learn from, or to write on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.forms import STDIN
from ..errors import DataError, UsageError
from .arguments import FileArguments
from .incoming import incoming
from .rows import read_rows, reading


def writes(model: Any) -> bool:
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
    if not (place == STDIN or Path(place).is_file()) or reading(args).form_of(place) not in (None, "text"):
        return read_rows(args, place, split, default)
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
