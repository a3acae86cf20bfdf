"""The tasks of the benchmarks: real data sets, and which rows do what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import datasets

DATA = Path(os.environ.get("HF_EARLYEXIT_DATA", "../shared/data"))
BACKBONE = "weights/bge-small-en-v1.5"


@dataclass(frozen=True)
class Task:
    """One data set and how it is trained.

    Attributes:
        folder: below the data folder.
        held_back: rows of train kept from training to choose thresholds on: a count, a share, or the name of a split.
        report: the split figures are reported on; nothing is tuned on it.
        epochs, batch_size, learning_rate, max_length: of the training run.
        seeds: runs that are made.
    """

    folder: str
    held_back: int | float | str
    report: str
    epochs: float
    batch_size: int = 32
    learning_rate: float = 5e-5
    max_length: int = 128
    seeds: tuple[int, ...] = (0,)


TASKS = {
    "sst2": Task("sst2", 3000, "dev", 2),
    "rte": Task("rte", 0.1, "dev", 4, batch_size=16),
    "mrpc": Task("mrpc", 0.1, "dev", 3, batch_size=16),
    "cola": Task("cola", 0.1, "dev", 3),
    "mcid": Task("mcid", "dev", "test", 20, batch_size=16, learning_rate=1e-4),
    "stackoverflow": Task("stackoverflow", "dev", "test", 2),
    "trec": Task("trec", 0.1, "test", 5),
}


def load_rows(task: Task) -> dict[str, datasets.Dataset]:
    """The rows of a task as "train", "held-back" and "report"; held-back rows are the same for every seed."""
    if not DATA.is_dir():
        raise SystemExit(f"No data at {DATA}; set HF_EARLYEXIT_DATA to the folder that holds {task.folder}/.")

    def read(split: str) -> datasets.Dataset:
        rows = datasets.Dataset.from_parquet(str(DATA / task.folder / f"{split}.parquet"))
        return rows.remove_columns([name for name in rows.column_names if name in ("label_text", "source_row")])

    train, report = read("train"), read(task.report)
    if isinstance(task.held_back, str):
        return {"train": train, "held-back": read(task.held_back), "report": report}
    count = task.held_back if isinstance(task.held_back, int) else round(task.held_back * len(train))
    order = train.shuffle(seed=0)
    return {
        "train": order.select(range(count, len(train))),
        "held-back": order.select(range(count)),
        "report": report,
    }
