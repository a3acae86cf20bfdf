"""Traces of rows that trained nothing, for benchmarks/promises.py: frozen bge-small, a linear head on every layer's mean.

python benchmarks/promises_traces.py TASK ...

The backbone never changes, so every layer's mean over the tokens is computed once and the heads are trained on those: one
linear layer for each exit, cross-entropy of each exit, AdamW. The heads share nothing, so no weighting of exits is needed.
A quarter of the training rows says after which epoch each head is best; gates (one linear layer on the same state) learn
ConsistentEE's exact objective on them. All labelled rows of a task are pooled, exact repeats dropped, and split anew for
each seed into rows that train and rows that nothing was trained on; the latter are the trace, kept in float16.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tasks import BACKBONE, DATA
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from hf_earlyexit import ExitTrace
from hf_earlyexit.losses import ConsistentObjective

TRACES = Path(__file__).parent / "traces"
TASKS = ("trec", "mcid", "rte", "mrpc", "cola", "sst2", "stackoverflow", "banking77", "clinc150")
MAX_LENGTH = 64
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 30, 32, 2e-3, 0.01
SHIFTS = ("trec", "cola", "stackoverflow")
GATE_SHARE, GATE_EPOCHS = 0.25, 60
ONE_SEED, MOST_CLASSES = 2000, 20  # rows of a pool, and the one seed, of tasks with more classes: their traces are large


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


class Heads(nn.Module):
    """One linear map for each exit, on states `[N, E, H]`."""

    def __init__(self, exits: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(exits, hidden, outputs))
        self.bias = nn.Parameter(torch.zeros(exits, outputs))

    def forward(self, states: Tensor) -> Tensor:
        """`[N, E, outputs]`."""
        return torch.einsum("neh,eho->neo", states, self.weight) + self.bias


def fit(
    module: nn.Module,
    rows: Tensor,
    epochs: int,
    loss_of: Callable[[Tensor], Tensor],
    after: Callable[[], None] = lambda: None,
) -> None:
    """Train a module by AdamW on batches of 256 of these rows; `after` is called after each epoch."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, epochs * -(-len(rows) // 256))
    for _ in range(epochs):
        for places in rows[torch.randperm(len(rows))].split(256):
            optimizer.zero_grad()
            loss_of(places).backward()
            optimizer.step()
            schedule.step()
        after()


def signals_of(states: Tensor, labels: Tensor, train: Tensor, pool: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Logits `[M, 12, C]` and leave logits `[M, 11]` on the pool, of heads and gates trained on other rows."""
    torch.manual_seed(seed)
    classes, (_, exits, hidden) = int(labels.max()) + 1, states.shape
    taught, gated = train[: round((1 - GATE_SHARE) * len(train))], train[round((1 - GATE_SHARE) * len(train)) :]
    states = (states - states[taught].mean(0)) / states[taught].std(0)  # an affine map, so that the heads stay linear
    heads, gates = Heads(exits, hidden, classes), Heads(exits - 1, hidden, 1)
    heads.bias.data += (torch.bincount(labels[taught], minlength=classes) + 1).log()  # starts as the frequencies are

    def row_losses_of(logits: Tensor, places: Tensor) -> Tensor:
        """`[n, E]`"""
        truth = labels[places].repeat_interleave(exits)
        return nn.functional.cross_entropy(logits.flatten(0, 1), truth, reduction="none").view(-1, exits)

    best, lowest = copy.deepcopy(heads), torch.full((exits,), float("inf"))

    @torch.no_grad()
    def keep_the_best() -> None:
        losses = row_losses_of(heads(states[gated]), gated).mean(0)
        better = losses < lowest
        lowest[better], best.weight[better], best.bias[better] = losses[better], heads.weight[better], heads.bias[better]

    fit(heads, taught, EPOCHS, lambda places: row_losses_of(heads(states[places]), places).mean(), keep_the_best)
    with torch.no_grad():
        logits = best(states)
        row_losses = row_losses_of(logits, torch.arange(len(labels)))
        wrong = logits.argmax(-1) != labels[:, None]
        hardness = (wrong * torch.arange(1, exits + 1)).amax(1).float()  # the last layer whose exit is wrong
    layers, objective = torch.arange(1, exits + 1), ConsistentObjective(alpha=0.05, estimator="exact")

    def gate_loss(places: Tensor) -> Tensor:
        leave = gates(states[places, :-1]).squeeze(-1)
        return objective(leave, row_losses[places], hardness[places], layers).gate_loss

    fit(gates, gated, GATE_EPOCHS, gate_loss)
    with torch.inference_mode():
        return logits[pool], gates(states[pool, :-1]).squeeze(-1)


def save_shifts(states: Tensor, labels: Tensor, train: Tensor, count: int) -> None:
    """What SST-2's heads say of sentences of other kinds, for the monitor."""
    for name in SHIFTS:
        others = states_of(read(name, count))
        every, blank = torch.cat([states, others]), torch.zeros(len(others), dtype=torch.long)
        places = torch.arange(len(states), len(every))
        logits, _ = signals_of(every, torch.cat([labels, blank]), train, places, 0)
        trace = ExitTrace(
            logits=logits.half(),
            labels=logits[:, -1].argmax(-1),
            labelled=False,
            exit_layers=tuple(range(1, logits.shape[1] + 1)),
        )
        trace.save(TRACES / f"shift-{name}.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--train-rows", type=int, default=3000)
    parser.add_argument("--pool-rows", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    TRACES.mkdir(exist_ok=True)
    for task in args.tasks:
        start = time.perf_counter()
        rows = read(task, args.train_rows + args.pool_rows)
        states, labels = states_of(rows), torch.as_tensor(rows["label"].to_numpy(), dtype=torch.long)
        large = int(labels.max()) + 1 > MOST_CLASSES
        num_pool = min(args.pool_rows, len(rows) // 2, ONE_SEED if large else len(rows))
        for seed in range(1 if large else args.seeds):
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
            pool, train = order[:num_pool], order[num_pool:]
            logits, gates = signals_of(states, labels, train, pool, seed)
            trace = ExitTrace(
                logits=logits.half(),
                labels=labels[pool],
                scalars={"gate": gates.half()},
                exit_layers=tuple(range(1, logits.shape[1] + 1)),
            )
            right = (trace.logits.argmax(-1) == trace.labels[:, None]).float().mean(0)
            trace.save(TRACES / f"{task}-{seed}.safetensors")
            shares = " ".join(f"{share:.3f}" for share in right)
            print(f"{task} {seed}: {len(train)} train, {num_pool} pool, {shares}", flush=True)
            if task == "sst2" and seed == 0:
                save_shifts(states, labels, train, args.pool_rows)
        print(f"{task}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
