"""Rows through Ray Data on this machine: what a second process adds, with Ray and without, and the memory of a million rows.

    HF_EARLYEXIT_DATA=../shared/data python benchmarks/load_ray.py

Adds to results/load.json, and makes the docs' page anew where `load.py` has written there. What every process does is
noted block by block: when, how many rows, and the memory it holds. Without Ray it is plain processes that share the same
blocks, which tells how much of a second core the machine really gives. A rate counts the rows of the blocks that began after
all processes had begun and ended before the first had nothing left to do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from load_page import add_files, keep
from load_servers import MODEL, prepare
from tasks import TASKS, load_rows
from transformers import BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.scale.ray import Classify, predict

NOTES = "EARLYEXIT_NOTES"
BLOCK = 256
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(200))]


class Noted(Classify):
    """Classifies blocks, and notes each in a file of this process."""

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        start = time.time()
        answers = super().__call__(block)
        note = noted(start, len(answers["exit_layer"]))
        with (Path(os.environ[NOTES]) / str(os.getpid())).open("a") as file:
            file.write(json.dumps(note) + "\n")
        return answers


def noted(start: float, rows: int) -> dict[str, float]:
    """What this process has done since then."""
    return {"start": start, "end": time.time(), "rows": rows, "rss": psutil.Process().memory_info().rss}


def run(dataset: Any, folder: Path, workers: int, block: int) -> list[list[dict[str, float]]]:
    """The notes of each process that answered the data set."""
    with TemporaryDirectory() as notes:

        class Here(Noted):
            def __init__(self, *args: Any) -> None:
                os.environ[NOTES] = notes
                super().__init__(*args)

        answered = predict(dataset, folder, workers=workers, batch_size=block, classify=Here)
        rows = sum(len(batch["exit_layer"]) for batch in answered.iter_batches(batch_size=block))
        found = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(Path(notes).iterdir())]
    if not rows == dataset.count() == sum(note["rows"] for notes_of in found for note in notes_of):
        raise SystemExit("Rows were lost or answered twice.")
    return found


@cache
def loaded(folder: Path) -> Classify:
    """What a plain process answers with."""
    return Classify(str(folder), "cpu", None, {})


def answer_plainly(folder: Path, block: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """A block in this process, which tells its number and its note."""
    classify, start = loaded(folder), time.time()
    return os.getpid(), noted(start, len(classify(block)["exit_layer"]))


def run_plainly(blocks: list[dict[str, Any]], folder: Path, workers: int) -> list[list[dict[str, float]]]:
    """As `run`, without Ray."""
    found: dict[int, list[dict[str, float]]] = {}
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for process, note in pool.map(partial(answer_plainly, folder), blocks):
            found.setdefault(process, []).append(note)
    return list(found.values())


def rows_per_second(found: list[list[dict[str, float]]]) -> float:
    """While all processes were at work."""
    start, end = max(notes[0]["start"] for notes in found), min(notes[-1]["end"] for notes in found)
    inside = [note for notes in found for note in notes if note["start"] >= start and note["end"] <= end]
    return sum(note["rows"] for note in inside) / (end - start)


def actors(work: Path, count: int, turns: int) -> dict[str, Any]:
    """Rows a second of one process and of two, with Ray and without, in turns."""
    import ray

    prepare(work, None, exports=False)
    texts = list(load_rows(TASKS["sst2"])["train"].select(range(count))["sentence"])
    dataset = ray.data.from_items([{"text": text} for text in texts]).repartition(count // BLOCK).materialize()
    blocks = [{"text": np.array(texts[at : at + BLOCK], dtype=object)} for at in range(0, count, BLOCK)]
    ways: dict[str, Callable[[int], list[list[dict[str, float]]]]] = {
        "": lambda workers: run(dataset, work / MODEL, workers, BLOCK),
        "plain_": lambda workers: run_plainly(blocks, work / MODEL, workers),
    }
    rates: dict[str, list[float]] = {}
    for _, (name, answer), (number, workers) in product(range(turns), ways.items(), (("one", 1), ("two", 2))):
        found = answer(workers)
        if len(found) != workers:
            raise SystemExit(f"{len(found)} of {workers} processes got rows.")
        rates.setdefault(name + number, []).append(rows_per_second(found))
        print(f"{name}{number}: {rates[name + number][-1]:.0f} rows/s", flush=True)
    return {"rows": count, **rates}


def million(work: Path, count: int) -> dict[str, Any]:
    """Memory of the process that answers many short rows, block by block."""
    import ray

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 128}
    model = ee.EarlyExitBertForSequenceClassification(ee.EarlyExitBertConfig(vocab_size=len(WORDS), **shape)).eval()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.5, 0.5, 0.5)))
    ee.save(model, work / "small", tokenizer=BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}))

    def text(row: dict[str, int]) -> dict[str, str]:
        chosen = random.Random(int(row["id"]))
        return {"text": " ".join(f"w{chosen.randrange(200)}" for _ in range(chosen.randint(1, 8)))}

    start = time.perf_counter()
    (notes,) = run(ray.data.range(count).map(text), work / "small", 1, 4096)
    seconds, held = time.perf_counter() - start, [note["rss"] / 2**20 for note in notes]
    parts = [median(part) for part in np.array_split(held, min(10, len(held)))]
    print(f"{count:,} rows in {seconds:.0f} s; MiB by tenths: {[round(part) for part in parts]}", flush=True)
    return {"rows": count, "seconds": seconds, "mebibytes": parts}


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=8192, help="rows that one and two processes answer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--many", type=int, default=1_000_000, help="short rows whose memory is watched")
    add_files(parser)
    args = parser.parse_args()
    # a core more than there are keeps Ray's own readers from waiting for the processes that compute
    ray.init(include_dashboard=False, num_cpus=(os.cpu_count() or 1) + 1, log_to_driver=False)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        found = {"actors": actors(work, args.count, args.turns), "million": million(work, args.many)}
    keep(args.results, args.page, {"ray": found})


if __name__ == "__main__":
    main()
