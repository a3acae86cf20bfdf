"""Splits of a folder, a file, standard input or a Hub data set, read by `datasets`."""

from __future__ import annotations

import atexit
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from ..images import SUFFIXES
from .formats import BUILDERS, FORMATS, STDIN, Reading, open_text, plain_suffix, readable

ALIASES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
PART = re.compile(r"([\w.]+)?(\[[^\]]*\])?(\([^)]*\))?")
SHARD = re.compile(r"-\d{5}-of-\d{5}$")
METADATA = "metadata"  # a file that tells more of the pictures beside it
NO_ROWS = ("dataset_info", "dataset_dict", "state")  # beside rows, written by datasets itself


class Source:
    """A data set by its name, whose splits are read one at a time, so that their columns may differ.

    Args:
        name: a folder with one file for each split, or as the Hub lays out data sets, or as `save_to_disk` leaves them, or
            of pictures, as the builder "imagefolder" reads them: a folder for each class, below one for each split; a
            file, which is one split; "-" for standard input; or the id of a data set on the Hub.
        reading: how files are read.

    Raises:
        DataError: where there is nothing to read.
    """

    def __init__(self, name: str, reading: Reading | None = None) -> None:
        self.name, self.reading = name, reading or Reading()
        self.is_file = name == STDIN or Path(name).is_file()
        self.saved: Any = None
        self.whole = False  # read by the data set's own card
        self.format: str | None = None  # as the card tells it
        with readable(name, self.reading):
            self.files = self._find()

    @property
    def splits(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.files)

    def read(self, split: str | None = None, default: str = "train") -> datasets.Dataset:
        """One split, a slice of it, or several after each other.

        Args:
            split: as in `datasets`: "test", "train[:100]", "train[10%:20%]", "train+validation"; names that mean the same,
                such as dev and validation, stand for each other. Of a file, "train" is all of it.
            default: the split to read if none is named; a file is read whatever it is.

        Raises:
            DataError: naming the splits there are, or what cannot be read.
        """
        wanted = split or ("train" if self.is_file else default)
        parts = [part.strip() for part in wanted.split("+")]
        pieces = []
        for part in parts:
            match = PART.fullmatch(part)
            if not part or match is None:
                raise DataError(
                    f"Split {wanted!r} cannot be read; expected such as test, train[:100], train[10%:20%] or train+test.",
                    field="split",
                    value=wanted,
                )
            name = self._known(match[1] or ("train" if self.is_file else default))
            pieces.append((name, name + (match[2] or "") + (match[3] or "")))
        with readable(self.name, self.reading):
            read = [self._read(name, spec) for name, spec in pieces]
            for rows in read:
                rows.data.table.validate(full=True)  # that texts are UTF-8, which JSON's reader leaves to whoever reads them
            return read[0] if len(read) == 1 else datasets.concatenate_datasets(read)

    def _known(self, name: str) -> str:
        if name in self.files:
            return name
        alike = [one for one in self.files if ALIASES.get(one, one) == ALIASES.get(name, name)]
        if len(alike) == 1:
            return alike[0]
        if self.is_file:
            raise DataError(
                f"{self.name} is one file, which has no split {name!r}; leave --split out, or slice it as 'train[:100]'.",
                field="split",
                value=name,
            )
        raise DataError(
            f"{self.name} has no split {name!r}; it has {', '.join(sorted(self.files))}.", field="split", value=name
        )

    def _find(self) -> dict[str, Any]:
        path = Path(self.name)
        if self.name == STDIN:
            return {"train": [STDIN]}
        if path.is_file():
            if self.reading.format_of(path) in (None, "text"):
                raise DataError(
                    f"{self.name} is a {path.suffix or 'file without suffix'}; expected one of {_suffixes()}, or its format "
                    "with --input_format.",
                    path=self.name,
                )
            return {"train": [self.name]}
        if not path.is_dir():
            return self._find_by_card()
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            saved = datasets.load_from_disk(self.name)
            self.saved = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
            return dict.fromkeys(self.saved)
        files_of: dict[str, list[str]] = {}
        for file in sorted(path.iterdir()):
            if file.is_file() and _holds_rows(file):
                files_of.setdefault(re.sub(r"\W", "_", _stem(file)), []).append(str(file))
        laid_out = _has_card(path) or any(SHARD.search(_stem(Path(file))) for files in files_of.values() for file in files)
        laid_out = laid_out or self.reading.config is not None or (set(files_of) <= {METADATA} and _holds_pictures(path))
        if laid_out or (not files_of and any(map(_holds_rows, path.rglob("*.*")))):
            return self._find_by_card()
        if not files_of:
            raise DataError(
                f"{self.name} holds no {_suffixes()} file; expected one per split, or pictures in a folder for each class.",
                path=self.name,
            )
        for split, files in files_of.items():
            if len(files) > 1:
                names = " and ".join(Path(file).name for file in files)
                raise DataError(
                    f"{self.name} holds two files for the split {split!r}: {names}; expected one.", path=self.name
                )
        return dict(files_of)

    def _find_by_card(self) -> dict[str, Any]:
        """Splits of a data set that tells itself where they are, on the Hub or in a folder laid out like one."""
        if not Path(self.name).is_dir() and (plain_suffix(self.name) in FORMATS or self.name.startswith((".", "/", "~"))):
            raise DataError(f"There is no file or folder {self.name}; check the name.", path=self.name)
        try:
            builder = datasets.load_dataset_builder(self.name, name=self.reading.config)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise DataError(
                f"{self.name} is no file or folder here, and the Hub does not give it: {str(error).splitlines()[0]}. "
                "Check the name and the connection.",
                path=self.name,
            ) from error
        self.whole = builder.info.features is not None or builder.name not in BUILDERS.values()
        files = getattr(builder.config, "data_files", None) or {}
        if self.whole and builder.info.splits:
            return dict.fromkeys(builder.info.splits)
        self.format = "tsv" if builder.name == "csv" and getattr(builder.config, "sep", ",") == "\t" else builder.name
        return {str(split): [str(file) for file in list_] for split, list_ in files.items()}

    def _read(self, name: str, spec: str) -> datasets.Dataset:
        if self.saved is not None:
            return _sliced(self.saved[name], name, spec)
        if self.whole:
            return datasets.load_dataset(self.name, name=self.reading.config, split=spec)
        files = self.files[name]
        format = self.reading.format_of(files[0]) or self.format or "text"
        if files == [STDIN]:
            files, format = [_spooled(self.reading)], self.reading.format or ""
            if format in ("", "text"):
                raise DataError(
                    "Standard input has no name that tells its format; say --input_format csv, tsv, jsonl or another.",
                    field="format",
                )
        if format in ("csv", "tsv"):
            return _read_cells(files, name, spec, self.reading, format)
        options = {"encoding": self.reading.encoding} if BUILDERS[format] == "json" and self.reading.encoding else {}
        return datasets.load_dataset(BUILDERS[format], data_files={name: files}, split=spec, **options)


def _read_cells(files: Sequence[str], name: str, spec: str, reading: Reading, format: str) -> datasets.Dataset:
    """CSV or TSV, every cell as the text that it is: "NA" and "" are texts, and 007 keeps its zeros."""
    import pandas

    options = reading.csv_options(format)
    for file in files:
        check_header(pandas.read_csv(file, nrows=1, dtype=str, **options), file, options["sep"])
    columns = pandas.read_csv(files[0], nrows=0, **options).columns
    features = datasets.Features({str(column): datasets.Value("string") for column in columns})
    rows = datasets.load_dataset("csv", data_files={name: list(files)}, split=spec, features=features, **options)
    if format == "tsv" and reading.quotes is None:
        import pyarrow.compute as compute

        for column in rows.column_names:
            broken = compute.any(compute.match_substring(rows.data.column(column), "\n")).as_py()
            if broken:
                raise lone_quote(files[0], column)
    return rows


def check_header(first: Any, file: str, separator: str) -> None:
    """Refuse a table whose first row does not fit its header, or whose separator is another.

    Args:
        first: a pandas frame, of at least the first row.
        file: its name.
        separator: it was read with.

    Raises:
        DataError: saying which.
    """
    import pandas

    columns = [str(column) for column in first.columns]
    if not isinstance(first.index, pandas.RangeIndex):
        raise DataError(
            f"{file}: the first row has more cells than the header has names ({', '.join(columns)}); quote cells that hold "
            "the separator, or name another with --separator.",
            path=file,
        )
    if len(columns) == 1:
        for other, word in ((";", "';'"), ("\t", "a tab: --input_format tsv"), (",", "','"), ("|", "'|'")):
            if other != separator and other in columns[0]:
                raise DataError(
                    f"{file} has one column, {columns[0]!r}; it seems to be separated by {word}. Name it with --separator.",
                    path=file,
                )


def lone_quote(file: str, column: str) -> DataError:
    """Of a TSV in which a double quote took in more than one line."""
    return DataError(
        f"{file} holds line breaks between double quotes in the column {column!r}. If quotes are characters like any other "
        "there, say --quotes false; if they hold cells together, --quotes true.",
        field="quotes",
        path=file,
    )


def _sliced(rows: datasets.Dataset, name: str, spec: str) -> datasets.Dataset:
    if spec == name:
        return rows
    (instruction,) = datasets.ReadInstruction.from_spec(spec).to_absolute({name: len(rows)})
    return rows.select(range(instruction.from_ or 0, len(rows) if instruction.to is None else instruction.to))


def _spooled(reading: Reading) -> str:
    """Standard input as a file, which data sets need; it is removed when the program ends."""
    suffix = "." + {"text": "txt"}.get(reading.format or "", reading.format or "rows")
    with tempfile.NamedTemporaryFile("wb", suffix=suffix, prefix="hf-earlyexit-", delete=False) as file:
        raw = getattr(sys.stdin, "buffer", None)
        if raw is not None:
            shutil.copyfileobj(raw, file)
        else:
            file.write(open_text(STDIN, reading).read().encode(reading.encoding or "utf-8"))
    atexit.register(Path(file.name).unlink, missing_ok=True)
    return file.name


def _holds_rows(file: Path) -> bool:
    return FORMATS.get(plain_suffix(file), "text") != "text" and not file.name.startswith((*NO_ROWS, ".", "_"))


def _holds_pictures(folder: Path) -> bool:
    return any(file.suffix.lower() in SUFFIXES and file.is_file() for file in folder.rglob("*.*"))


def _stem(file: Path) -> str:
    """The name without the suffix of its format, and without that of a packed file."""
    return Path(file.stem).stem if plain_suffix(file) != file.suffix.lower() else file.stem


def _has_card(folder: Path) -> bool:
    card = folder / "README.md"
    return card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")


def _suffixes() -> str:
    return ", ".join(suffix for suffix, format in FORMATS.items() if format != "text")
