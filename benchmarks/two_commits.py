"""Is this tree as fast as another commit? Both answer the same rows in turns, each in a process of its own.

    OMP_NUM_THREADS=1 python benchmarks/two_commits.py 573f3a0
    OMP_NUM_THREADS=1 python benchmarks/two_commits.py 573f3a0 --shapes bert --rows 100 --turns 9

BERT of two shapes with random weights, an exit after every layer and rows that leave after 6 of 12 in the mean; `predict` of
all rows, and `model(...)` row by row. CPU time of one thread; the ratio is this tree over the other commit, median and
middle half of the turns, so that above 1 is slower. It also tells whether all exits of
rows that ran alone, in full, gave the same numbers to the bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {"minilm": (384, 12, 1536), "bert": (768, 12, 3072)}
WORKER = """
import hashlib, sys, time
import numpy as np, torch
import hf_earlyexit as ee
torch.set_num_threads(1)
width, heads, inner, count, precision = (int(word) if word.isdigit() else word for word in sys.argv[1:])
torch.manual_seed(0)
shape = dict(hidden_size=width, num_attention_heads=heads, intermediate_size=inner, num_hidden_layers=12, num_labels=2)
model = ee.EarlyExitBertForSequenceClassification(ee.EarlyExitBertConfig(exit_head="linear-cls", **shape)).eval()
model = ee.quantize_int8(model) if precision == "int8" else model
draw = np.random.default_rng(0)
lengths = np.clip(np.exp(draw.normal(np.log(28), 0.5, count)).round(), 3, 128).astype(int)
rows = [{"input_ids": draw.integers(1000, 30000, length).tolist()} for length in lengths]
with torch.inference_mode():
    logits = torch.cat([model(input_ids=torch.tensor([row["input_ids"]]), early_exit=False).exit_logits for row in rows])
scores, left, levels = logits.softmax(-1).amax(-1).double(), torch.arange(count), []
wanted = np.clip(np.random.default_rng(1).normal(6, 2.5, 100_000).round(), 1, 12)
for layer in range(1, 12):
    share = (wanted == layer).sum() / (wanted >= layer).sum()
    levels.append(min(float(scores[left, layer - 1].quantile(1 - share)) if len(left) else 1.0, 1.0))
    left = left[scores[left, layer - 1] < levels[-1]]
model.set_exit_policy(ee.ConfidencePolicy(thresholds=tuple(levels), exit_layers=model.exit_layers))
few = [torch.tensor([row["input_ids"]]) for row in rows[:40]]
def many():
    return ee.predict(model, rows)
@torch.inference_mode()
def single():
    for ids in few:
        model(input_ids=ids)
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest(), float(many().exit_layer.float().mean()), flush=True)
single()
for line in sys.stdin:
    run = many if line.strip() == "many" else single
    start = time.thread_time()
    run()
    print(time.thread_time() - start, flush=True)
"""


class Worker:
    """A process on the code of one tree."""

    def __init__(self, tree: Path, words: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WORKER, *words], cwd=tree, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.answers = self.read()

    def read(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def seconds(self, what: str) -> float:
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return float(self.read()[0])

    def end(self) -> None:
        self.process.communicate()


def compared(other: Path, shape: str, precision: str, count: int, turns: int) -> dict[str, Any]:
    """Ratios of CPU time, this tree over the other, in turns whose order is drawn."""
    words = [*map(str, SHAPES[shape]), str(count), precision]
    workers = {"this": Worker(ROOT, words), "other": Worker(other, words)}
    found: dict[str, Any] = {"shape": shape, "precision": precision, "mean_layers": float(workers["this"].answers[1])}
    found["same_to_the_bit"] = workers["this"].answers[0] == workers["other"].answers[0]
    draw = random.Random(0)
    for what in ("many", "single"):
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(turns):
            for name in draw.sample(list(workers), 2):
                seconds[name].append(workers[name].seconds(what))
        ratios = [ours / theirs for ours, theirs in zip(seconds["this"], seconds["other"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[what] = {"ratio": round(middle, 3), "middle_half": [round(low, 3), round(high, 3)], "turns": turns}
    for worker in workers.values():
        worker.end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--turns", type=int, default=7)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "other"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", tree, args.commit], check=True)
        try:
            for shape, precision in product(args.shapes, ("fp32", "int8")):
                count = args.rows // (4 if shape == "bert" else 1)
                print(json.dumps(compared(tree, shape, precision, count, args.turns)), flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


if __name__ == "__main__":
    main()
