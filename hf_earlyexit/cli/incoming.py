"""Rows to answer, one after the other, from whatever holds them: never more of them in memory than are under way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ..data.formats import STDIN, open_text, unreadable_file
from ..errors import DataError
from ..images import SUFFIXES
from ..serving.tables import PIXELS, text_columns
from .arguments import FileArguments
from .pictures import COLUMN, check_columns, folder_of, located, picture_column, picture_file, undecoded
from .rows import reading

Row = dict[str, Any]
CHUNK = 1000  # rows that are read at a time where a reader gives several


@dataclass(frozen=True)
class Incoming:
    """Rows as they come.

    Attributes:
        rows: each by column name, in order.
        text_columns: the column of the texts, or two of pairs; or that of the pictures.
        folder: where names of pictures start; `None` for texts.
        total: how many rows, where that is known.
    """

    rows: Iterator[Row]
    text_columns: tuple[str, ...]
    total: int | None = None
    folder: Path | None = None

    def text(self, row: Row) -> Any:
        """What is to be answered of a row: a text, a pair or a picture; `None` in place of one that is missing."""
        texts = [row.get(name) for name in self.text_columns]
        if self.folder is not None:
            name = PIXELS if self.text_columns == (PIXELS,) else COLUMN
            return {name: located(texts[0], self.folder)}
        return texts[0] if len(texts) == 1 else tuple(texts)

    def kept(self, row: Row) -> Row:
        """What an answer keeps of its row: of a picture the name."""
        if self.folder is None:
            return row
        return {name: picture_file(value) if name in self.text_columns else value for name, value in row.items()}


def incoming(args: FileArguments, place: str, split: str | None, images: bool = False) -> Incoming:
    """Open what is to be answered.

    Args:
        args: flags.
        place: a text file with one text a line, or whatever `Source` reads; "-" is standard input, of texts unless told.
        split: of a data set; "test" by default.
        images: whether the model reads pictures. A file may then be a picture, and a text file has the name of one a line.

    Raises:
        DataError: for what cannot be read, now or, by row or file, when it is met.
    """
    check_columns(args, images)
    how = reading(args)
    is_file = place == STDIN or Path(place).is_file()
    format = (how.format_of(place) or "text") if is_file else None
    total = None
    if images and is_file and Path(place).suffix.lower() in SUFFIXES:
        return Incoming(iter([{COLUMN: Path(place).name}]), (COLUMN,), 1, folder_of(place))
    if format in READERS and split is None:
        rows = _guarded(place, how, READERS[format](place, how))
    else:
        from ..data.sources import Source

        source = Source(place, how)
        default = source.splits[0] if images and len(source.splits) == 1 else "test"
        split_rows = source.read(split, default)
        total = len(split_rows)
        rows = _of_data_set(undecoded(split_rows) if images else split_rows)
    if args.max_rows is not None:
        rows = islice(rows, args.max_rows)
        total = None if total is None else min(total, args.max_rows)
    first = next(rows, None)
    if first is None:
        return Incoming(iter(()), ("text",), 0)
    rows = chain([first], rows)
    if not images:
        return Incoming(rows, _columns_of_texts(args, first, place), total)
    if format == "text":
        rows, first = ({COLUMN: row["text"]} for row in rows), {COLUMN: None}
    return Incoming(rows, (picture_column(args, list(first), place),), total, folder_of(place))


def _columns_of_texts(args: FileArguments, first: Row, place: str) -> tuple[str, ...]:
    if args.text_column is None:
        return text_columns(list(first))
    for name in args.text_column:
        if name not in first:
            raise DataError(f"{place} has no column {name!r}; it has {', '.join(first)}.", field="text_column", value=name)
    return tuple(args.text_column)


def _lines(place: str, how: Any) -> Iterator[Row]:
    """Texts, each ended by a line feed, with or without a carriage return before it, and by nothing else."""
    with open_text(place, how) as file:
        for line in file:
            yield {"text": line.removesuffix("\n").removesuffix("\r")}


def _objects(place: str, how: Any) -> Iterator[Row]:
    """JSON Lines."""
    with open_text(place, how) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"Line {number} of {place} is not JSON ({error}); expected one object a line.", path=place
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"Line {number} of {place} is a JSON {type(row).__name__}; expected an object.", path=place)
            yield row


def _cells(format: str) -> Callable[[str, Any], Iterator[Row]]:
    def read(place: str, how: Any) -> Iterator[Row]:
        import pandas

        from ..data.sources import check_header, lone_quote

        options = how.csv_options(format)
        with open_text(place, how) as file:
            for part in pandas.read_csv(file, dtype=str, chunksize=CHUNK, **{**options, "encoding": None}):
                check_header(part, place, options["sep"])
                for row in part.where(part.notna(), None).to_dict("records"):
                    if format == "tsv" and how.quotes is None:
                        for name, cell in row.items():
                            if cell is not None and "\n" in cell:
                                raise lone_quote(place, str(name))
                    yield {str(name): cell for name, cell in row.items()}

    return read


READERS: dict[str | None, Callable[[str, Any], Iterator[Row]]] = {
    "text": _lines,
    "jsonl": _objects,
    "csv": _cells("csv"),
    "tsv": _cells("tsv"),
}


def _of_data_set(rows: Any) -> Iterator[Row]:
    for batch in rows.iter(CHUNK):
        yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))


def _guarded(place: str, how: Any, rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows; what their reader raises names the file."""
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except DataError:
            raise
        except (ValueError, EOFError) as error:  # undecodable, torn or otherwise no such file
            if "No columns to parse" in str(error):
                return  # empty
            raise unreadable_file(place, how, error) from error
        yield row
