"""Answers written as they come, in the format that a file's name tells; a run that was stopped goes on where it was."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.formats import PACKED, plain_suffix
from ..errors import CheckpointError, DataError, UsageError
from ..files import read_json, write_json
from ..values import unexpected
from .command_result import as_line, finite

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
WINDOW = 1024  # rows that are written at a time


class OutputFile:
    """A file of answers, whole under its name once all rows are written; until then beside it, with how far it came.

    Args:
        path: its suffix tells the format: JSON Lines, CSV, TSV, Parquet or Arrow; all but these two may end in .gz.
        run: what must be the same for a stopped run to go on: model, input, options.
        resume: go on with what a stopped run left; `False` begins anew; `None` refuses to choose.

    Attributes:
        done: rows that a stopped run wrote already.

    Raises:
        UsageError: for a suffix that tells no format, or a stopped run that may not, or cannot, go on.
    """

    def __init__(self, path: str, run: dict[str, Any], resume: bool | None) -> None:
        self.path, self.run = Path(path), run
        check_output(path)
        self.part = self.path.with_name(self.path.name + ".part")
        self.state = self.path.with_name(self.path.name + ".part.json")
        self.suffix = plain_suffix(path)
        self.columns: list[str] | None = None
        self.done, start = self._stopped(resume)
        if start is not None:
            os.truncate(self.part, start)
        if self.suffix in (".parquet", ".arrow"):
            self.write: Callable[[Sequence[Row]], None] = self._write_table
            self.table: Any = None
            self.file: Any = open(self.part, "wb")  # noqa: SIM115  # closed by `write_all`
        else:
            opener: Any = PACKED.get(self.path.suffix.lower(), open)
            self.file = opener(self.part, "ab" if start is not None else "wb")
            self.write = self._write_lines if self.suffix in (".jsonl", ".ndjson") else self._write_cells

    def write_all(self, rows: Iterable[Row]) -> None:
        """Write rows as they come; after an error or an interruption, what was written can be gone on with."""
        waiting: list[Row] = []
        count = self.done
        try:
            for row in rows:
                waiting.append(row)
                if len(waiting) == WINDOW:
                    count = self._keep(waiting, count)
            count = self._keep(waiting, count)
        except BaseException:
            self.file.close()
            raise
        if self.suffix in (".parquet", ".arrow"):
            if self.table is None:
                self._write_table([])
            self.table.close()
        self.file.close()
        with open(self.part, "rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.path)
        self.state.unlink(missing_ok=True)

    def _keep(self, waiting: list[Row], count: int) -> int:
        if not waiting:
            return count
        self.write(waiting)
        count += len(waiting)
        waiting.clear()
        if self._may_resume:
            self.file.flush()
            kept = {"rows": count, "bytes": self.file.tell(), "columns": self.columns, "run": self.run}
            write_json(self.state, kept, allow_nan=True)
        return count

    @property
    def _may_resume(self) -> bool:
        return self.path.suffix.lower() in (".jsonl", ".ndjson", ".csv", ".tsv")

    def _stopped(self, resume: bool | None) -> tuple[int, int | None]:
        """Rows that a stopped run wrote, and the bytes they take; 0 and `None` to begin anew."""
        if resume and not self._may_resume:
            raise UsageError(
                f"A run that writes {self.path.name} cannot be gone on with; write .jsonl, .csv or .tsv.", field="resume"
            )
        if resume is False or not (self.part.is_file() and self.state.is_file()):
            return 0, None
        try:
            left = read_json(self.state)
            rows, start = int(left["rows"]), int(left["bytes"])
            self.columns = left["columns"]
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{self.state} is damaged ({error}); begin anew with --resume false.", path=self.state
            ) from error
        if resume is None:
            raise UsageError(
                f"{self.part} holds {rows} answers of a run that was stopped; go on with --resume true, or begin anew with "
                "--resume false.",
                field="resume",
                path=self.part,
            )
        differs = [name for name in self.run if left.get("run", {}).get(name) != self.run[name]]
        if differs or self.part.stat().st_size < start:
            what = ", ".join(differs) or "the file itself"
            raise UsageError(
                f"{self.part} was written by another run ({what} differs); begin anew with --resume false.",
                field="resume",
                path=self.part,
            )
        return rows, start

    def _write_lines(self, rows: Sequence[Row]) -> None:
        self.file.write("".join(as_line(row) + "\n" for row in rows).encode())

    def _write_cells(self, rows: Sequence[Row]) -> None:
        text = io.StringIO()
        writer = csv.writer(text, delimiter="," if self.suffix == ".csv" else "\t", lineterminator="\n")
        if self.columns is None:
            self.columns = list(rows[0])
            writer.writerow([_cell(name) for name in self.columns])
        for row in rows:
            writer.writerow([_cell(row.get(name)) for name in self._known(row)])
        self.file.write(text.getvalue().encode())

    def _write_table(self, rows: Sequence[Row]) -> None:
        import pyarrow
        from pyarrow import parquet

        plain = [finite(row) for row in rows]
        try:
            if self.table is None:
                self.columns = list(rows[0]) if rows else []
                table = pyarrow.Table.from_pylist(plain, schema=None)
                nothing = pyarrow.null()
                fields = [one.with_type(pyarrow.string()) if one.type == nothing else one for one in table.schema]
                self.schema = pyarrow.schema(fields)
                made = parquet.ParquetWriter if self.suffix == ".parquet" else pyarrow.ipc.new_stream
                self.table = made(self.file, self.schema)
            for row in rows:
                self._known(row)
            self.table.write_table(pyarrow.Table.from_pylist(plain, schema=self.schema))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError) as error:
            raise DataError(
                f"{self.path.name} cannot hold these rows ({error}): a column holds values of one type. Write .jsonl.",
                path=self.path,
            ) from error

    def _known(self, row: Row) -> list[str]:
        """The columns of the first row, where this one has no others."""
        columns = self.columns or []
        new = [name for name in row if name not in columns]
        if new:
            raise DataError(
                f"A row has a column {new[0]!r} that the first one had not; {self.path.name} has one set of columns. Write "
                ".jsonl.",
                field=new[0],
            )
        return columns


def check_output(path: str) -> None:
    """Refuse a name that tells no form, before anything is computed.

    Raises:
        UsageError: naming the suffixes there are.
    """
    place = Path(path)
    if plain_suffix(path) not in SUFFIXES or (place.suffix in PACKED and plain_suffix(path) in SUFFIXES[-2:]):
        raise unexpected("output", path, f"a name that ends in {', '.join(SUFFIXES)}; .gz may follow the first four")
    if not place.parent.is_dir() or place.is_dir():
        raise unexpected("output", path, "a file in a folder that is there")


def _cell(value: Any) -> Any:
    """A value as a cell; a text that a spreadsheet would compute gets an apostrophe before it."""
    value = finite(value)
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str) and value.startswith(FORMULA) and not _is_number(value):
        return "'" + value
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "\t" not in text and "\r" not in text


def skipped(rows: Iterator[Row], count: int) -> Iterator[Row]:
    """The rows behind the first `count`.

    Raises:
        UsageError: if there are fewer.
    """
    for number in range(count):
        if next(rows, None) is None:
            raise UsageError(
                f"The input has {number} rows, fewer than the {count} that the stopped run answered; begin anew with "
                "--resume false.",
                field="resume",
            )
    return rows
