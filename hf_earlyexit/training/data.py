"""Data sets from folders, files or the Hub."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets

from ..data.formats import Reading
from ..data.labelling import as_numbers, learn_labelling
from ..data.sources import Source
from ..errors import DataError
from ..serving.tables import text_columns


def load_splits(source: str, reading: Reading | None = None) -> datasets.DatasetDict:
    """All splits of a folder with one file per split, of a single file ("train"), or of a Hub data set.

    Args:
        source: as in `Source`, which reads splits one at a time.
        reading: how files are read.

    Returns:
        Splits by name, whose columns may differ. Cells of CSV and TSV are texts, but for a column `label` of numbers.

    Raises:
        DataError: if there is nothing to read.
    """
    data_source = Source(source, reading)
    return datasets.DatasetDict({split: _with_numbers(data_source.read(split)) for split in data_source.splits})


def _with_numbers(rows: datasets.Dataset) -> datasets.Dataset:
    if "label" not in rows.features or rows.features["label"] != datasets.Value("string"):
        return rows
    labels = as_numbers(rows["label"])
    if labels is None:
        return rows
    return rows.remove_columns("label").add_column("label", labels).select_columns(rows.column_names)


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
    """Names of the classes, from the label feature, the labels or a `label_text` column; `None` for values.

    Raises:
        DataError: for labels whose meaning is not plain, naming the row.
    """
    if "label" not in rows.features:
        raise DataError(f"No column 'label' among {', '.join(rows.features)}; rename the column of labels.", field="label")
    labelling = learn_labelling(
        rows["label"],
        "label",
        class_names=getattr(rows.features["label"], "names", None),
        texts=rows["label_text"] if "label_text" in rows.column_names else None,
    )
    return labelling.shown_names


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
