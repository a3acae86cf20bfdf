"""Traces of rows that trained nothing, for benchmarks/promises.py: frozen bge-small, a linear head on every layer's mean.

python benchmarks/promises_traces.py TASK ...

The backbone never changes, so every layer's mean over the tokens is computed once and the heads are trained on those: one
linear layer for each exit, cross-entropy of each exit, AdamW. The heads share nothing, so no weighting of exits is needed.
All labelled rows of a task are pooled, exact repeats dropped, and split anew for each seed into rows that train the heads
and rows that nothing was trained on; the latter are the trace.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tasks import BACKBONE, DATA
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_earlyexit import ExitTrace

TRACES = Path(__file__).parent / "traces"
TASKS = ("trec", "mcid", "rte", "mrpc", "cola", "sst2", "stackoverflow", "banking77", "clinc150")
MAX_LENGTH = 64
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 30, 32, 2e-3, 0.01


def read(task: str, most: int) -> pd.DataFrame:
    """All labelled rows of a task, shuffled, repeats of a text dropped, at most so many."""
    rows = pd.concat([pd.read_parquet(path) for path in sorted((DATA / task).glob("*.parquet"))], ignore_index=True)
    texts = [name for name in rows.columns if name in ("sentence", "text", "sentence1", "sentence2")]
    rows = rows[[*texts, "label"]].drop_duplicates(texts)
    return rows.sample(frac=1, random_state=0).head(most).reset_index(drop=True)


@torch.inference_mode()
def states_of(rows: pd.DataFrame) -> Tensor:
    """Mean over the tokens of each layer's output `[N, 12, hidden]`, in float32, by batches of like lengths."""
    folder = DATA / BACKBONE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    texts = [rows[name].tolist() for name in rows.columns if name != "label"]
    ids = tokenizer(*texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    order = np.argsort([len(row) for row in ids], kind="stable")
    states = torch.empty(len(rows), model.config.num_hidden_layers, model.config.hidden_size)
    for places in np.array_split(order, max(1, len(order) // BATCH)):
        batch = tokenizer(
            *[[part[place] for place in places] for part in texts],
            truncation=True,
            max_length=MAX_LENGTH,
            padding=True,
            return_tensors="pt",
        )
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch, output_hidden_states=True).hidden_states[1:]
        states[torch.as_tensor(places)] = torch.stack([(h * mask).sum(1) / mask.sum(1) for h in hidden], 1)
    return states


def logits_of(states: Tensor, labels: Tensor, train: Tensor, pool: Tensor, seed: int) -> Tensor:
    """Heads trained on some rows, and their logits on others `[M, 12, C]`."""
    torch.manual_seed(seed)
    classes, (_, exits, hidden) = int(labels.max()) + 1, states.shape
    mean, spread = states[train].mean(0), states[train].std(0)
    states = (states - mean) / spread  # an affine map, so that the heads stay linear
    weight = nn.Parameter(torch.randn(exits, hidden, classes) * 0.02)
    bias = nn.Parameter(torch.zeros(exits, classes))
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * -(-len(train) // 256)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(EPOCHS):
        for places in train[torch.randperm(len(train))].split(256):
            logits = torch.einsum("neh,ehc->nec", states[places], weight) + bias
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[places].repeat_interleave(exits))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.inference_mode():
        return torch.einsum("neh,ehc->nec", states[pool], weight) + bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--pool-rows", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    TRACES.mkdir(exist_ok=True)
    for task in args.tasks:
        start = time.perf_counter()
        rows = read(task, args.train_rows + args.pool_rows)
        states, labels = states_of(rows), torch.as_tensor(rows["label"].to_numpy(), dtype=torch.long)
        num_pool = min(args.pool_rows, len(rows) // 2)
        for seed in range(args.seeds):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            pool, train = order[:num_pool], order[num_pool:]
            logits = logits_of(states, labels, train, pool, seed)
            trace = ExitTrace(
                logits=logits.half().float(), labels=labels[pool], exit_layers=tuple(range(1, logits.shape[1] + 1))
            )
            right = (trace.logits.argmax(-1) == trace.labels[:, None]).float().mean(0)
            trace.save(TRACES / f"{task}-{seed}.safetensors")
            shares = " ".join(f"{share:.3f}" for share in right)
            print(f"{task} {seed}: {len(train)} train, {num_pool} pool, {shares}", flush=True)
        print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
