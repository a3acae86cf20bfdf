"""What kinds of files are read, and how each is opened; errors that name the file and say what to do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, EarlyExitError, UsageError
from ..values import unexpected

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
BUILDERS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "arrow": "arrow"}
STDIN = "-"


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        format: one of the values of `FORMATS`, for a file whose name does not tell it.
        encoding: of texts; UTF-8 by default.
        separator: of the cells in CSV; a comma by default, in TSV a tab.
        quotes: whether double quotes hold a cell of CSV or TSV together. `None` means yes, but in TSV no line break may
            stand between them, since there a lone quote is often a character like any other.
        config: name of a configuration, of a data set that has several.
    """

    format: str | None = None
    encoding: str | None = None
    separator: str | None = None
    quotes: bool | None = None
    config: str | None = None

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS.values():
            raise unexpected("format", self.format, f"one of {', '.join(dict.fromkeys(FORMATS.values()))}")
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError as error:
                raise UsageError(
                    f"encoding is {self.encoding!r}, which Python does not know; expected such as utf-8, latin-1 or cp1252.",
                    field="encoding",
                    value=self.encoding,
                ) from error
        if self.separator is not None and len(self.separator) != 1:
            raise unexpected("separator", self.separator, "one character")

    def format_of(self, path: str | Path) -> str | None:
        """What a file holds: as told, else by its name; `None` where neither says."""
        return self.format or FORMATS.get(plain_suffix(path))

    def csv_options(self, format: str) -> dict[str, Any]:
        """Arguments of `pandas.read_csv` with which every cell stays the text that it is."""
        separator = self.separator or ("\t" if format == "tsv" else ",")
        none, minimal = 3, 0  # csv.QUOTE_NONE, csv.QUOTE_MINIMAL
        return {
            "sep": separator,
            "encoding": self.encoding or "utf-8",
            "quoting": none if self.quotes is False else minimal,
            "keep_default_na": False,
            "skip_blank_lines": True,
        }


def plain_suffix(path: str | Path) -> str:
    """The last suffix of a name that says something of its content: that before `.gz`, if there is one."""
    name = Path(path)
    return (Path(name.stem) if name.suffix.lower() in PACKED else name).suffix.lower()


def open_text(place: str, reading: Reading) -> IO[str]:
    """A file, or standard input for "-", as text whose lines end with a line feed and with nothing else."""
    encoding = reading.encoding or "utf-8-sig"
    if place == STDIN:
        # what was given to the program as bytes is read as told, whatever the locale; tests put plain text in its place
        raw = getattr(sys.stdin, "buffer", None)
        return io.TextIOWrapper(raw, encoding=encoding, newline="\n") if raw is not None else sys.stdin
    opener = PACKED.get(Path(place).suffix.lower(), open)
    return opener(place, "rt", encoding=encoding, newline="\n")  # type: ignore[no-any-return, operator]


@contextmanager
def readable(place: str, reading: Reading) -> Iterator[None]:
    """Turn whatever readers raise into one error that names the file and says what to do.

    Raises:
        DataError: instead of any error but ours, one of the operating system among them.
    """
    import datasets
    import pyarrow

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises
    try:
        yield
    except (EarlyExitError, MemoryError, ModuleNotFoundError):
        raise
    except (ValueError, OSError, EOFError, RuntimeError, TypeError, lzma.LZMAError, pyarrow.ArrowException) as error:
        raise unreadable_file(place, reading, error) from error
    except Exception as error:  # datasets wraps all that its readers raise, in classes of its own
        if not type(error).__module__.startswith(("datasets", "huggingface_hub", "fsspec")):
            raise
        raise unreadable_file(place, reading, error) from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def unreadable_file(place: str, reading: Reading, error: BaseException) -> DataError:
    """What kept a file from being read, in words."""
    cause = error
    while isinstance(cause.__cause__, Exception):
        cause = cause.__cause__
    name = "standard input" if place == STDIN else place
    first = next((line.strip() for line in str(cause).split("\n") if line.strip()), type(cause).__name__)
    if isinstance(cause, UnicodeError) or "UTF8" in first:
        place_in = f" ({cause.object[cause.start : cause.start + 1]!r})" if isinstance(cause, UnicodeDecodeError) else ""
        return DataError(
            f"{name} is not text in {reading.encoding or 'UTF-8'}{place_in}; name its encoding, such as --encoding latin-1.",
            field="encoding",
            path=place,
        )
    if "corresponds to no data" in first or "No columns to parse" in first:
        return DataError(f"{name} has no rows; expected at least one, below a header where the format has one.", path=place)
    hint = ""
    if "Error tokenizing data" in first:
        hint = " Quote cells that hold the separator, name another with --separator, or say --quotes false."
    elif "Config name is missing" in first or "BuilderConfig" in first:
        hint = " Name one with --dataset_config."
    elif reading.format_of(place) is not None:
        hint = " Check that the file is whole, and that its name or --input_format tells its format."
    return DataError(f"{name} cannot be read: {first}{'' if first.endswith('.') else '.'}{hint}", path=place)
