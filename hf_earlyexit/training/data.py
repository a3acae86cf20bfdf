"""Data sets from folders, files or the Hub."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import DataError
from ..serving.rows import text_columns

READERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json"}


def load_splits(source: str) -> datasets.DatasetDict:
    """All splits of a folder with one file per split, of a single file ("train"), or of a Hub data set.

    Raises:
        DataError: if there is nothing to read.
    """
    path = Path(source)
    if path.is_dir():
        files = {file.stem: str(file) for file in sorted(path.iterdir()) if file.suffix in READERS}
        if not files:
            raise DataError(f"{source} holds no {', '.join(READERS)} file; expected one per split.", path=source)
        kinds = {READERS[Path(file).suffix] for file in files.values()}
        if len(kinds) > 1:
            raise DataError(f"{source} mixes {' and '.join(sorted(kinds))} files; expected one kind.", path=source)
        return datasets.load_dataset(kinds.pop(), data_files=files)
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{source} is a {path.suffix} file; expected one of {', '.join(READERS)}.", path=source)
        return datasets.load_dataset(READERS[path.suffix], data_files={"train": str(path)})
    return datasets.load_dataset(source)


def require_split(splits: datasets.DatasetDict, name: str, source: str) -> datasets.Dataset:
    """One split.

    Raises:
        DataError: naming the splits there are.
    """
    if name not in splits:
        raise DataError(f"{source} has no split {name!r}; it has {', '.join(splits)}.", field="split", value=name)
    return splits[name]


def hold_back(rows: datasets.Dataset, share: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Shuffled rows, split into those to train on and those to choose thresholds on.

    Raises:
        DataError: for a share that leaves one side empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        raise DataError(
            f"held_back is {share} of {len(rows)} rows; expected a share that leaves rows on both sides.",
            field="held_back",
            value=share,
        )
    shuffled = rows.shuffle(seed=seed)
    return shuffled.select(range(count, len(rows))), shuffled.select(range(count))


def label_names(rows: datasets.Dataset) -> list[str] | None:
    """Names of the classes, from the label feature or a `label_text` column; `None` for values."""
    if "label" not in rows.features:
        raise DataError(f"No column 'label' among {', '.join(rows.features)}; rename the column of labels.", field="label")
    feature = rows.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    labels = rows["label"]
    if any(isinstance(label, float) for label in labels[:1]):
        return None
    count = max(labels) + 1
    if "label_text" in rows.column_names:
        return [name for _, name in sorted(set(zip(labels, rows["label_text"], strict=True)))]
    return [f"LABEL_{index}" for index in range(count)]


def with_ids(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    """Rows with an id each: the column itself, or where it is absent a digest of the row's content.

    Equal rows are numbered; it does not matter in which order, since they are equal.
    """
    if column in rows.column_names:
        return rows
    counts: Counter[str] = Counter()
    ids = []
    for row in rows:
        digest = hashlib.blake2b(json.dumps(row, sort_keys=True, default=str).encode(), digest_size=12).hexdigest()
        counts[digest] += 1
        ids.append(f"{digest}-{counts[digest]}")
    return rows.add_column(column, ids)


def encode(rows: datasets.Dataset, tokenizer: Any, max_length: int, keep: Sequence[str] = ()) -> datasets.Dataset:
    """Token ids and labels, and the columns to keep."""
    columns = text_columns(rows.column_names)
    return rows.map(
        lambda batch: tokenizer(*(batch[name] for name in columns), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=[name for name in rows.column_names if name not in ("label", *keep)],
        desc="tokenizing",
    )
