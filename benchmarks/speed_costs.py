"""What the exits themselves cost: tests, Python, training, and how the papers' own loop compares.

    OMP_NUM_THREADS=1 python benchmarks/speed_costs.py --shape bert

adds them to benchmarks/results/speed.json and makes docs/how-to/speed.md anew. Each figure is a ratio of runs taken in turn
in one process, in random order: the median, and the middle half. Time is the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from functools import partial

import numpy as np
import torch
from speed import all_exits, mixed_rows, spread_out
from speed_page import SHAPES, add_results
from transformers import BertConfig, BertForSequenceClassification

import hf_earlyexit as ee
from hf_earlyexit.calibration.search import sweep
from hf_earlyexit.measuring.bench import environment
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.timing import seconds_in_turns


def make(shape: dict, head: str = "linear-cls"):
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(num_hidden_layers=12, num_labels=2, exit_head=head, **shape)
    return ee.EarlyExitBertForSequenceClassification(config).eval()


def equal_rows(count: int, length: int) -> list[dict]:
    rng = np.random.default_rng(2)
    return [{"input_ids": rng.integers(1000, 30000, length).tolist()} for _ in range(count)]


def ratios(runs: dict, over: str, repeats: int, inner: int = 1) -> dict[str, list[float]]:
    """Times of each run over those of one of them, turn by turn: low quarter, median, high quarter; and microseconds."""

    def again(run):
        for _ in range(inner):
            run()

    seconds = seconds_in_turns({name: [partial(again, run)] for name, run in runs.items()}, repeats, clock=time.thread_time)
    quarters = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    found = {}
    for name, times in seconds.items():
        share = (times / seconds[over]).sum(1).quantile(quarters).tolist()
        found[name] = {"ratio": share, "microseconds": 1e6 * float(times.median()) / inner, "turns": repeats}
    return found


@torch.inference_mode()
def exit_tests(shape: dict, repeats: int) -> dict:
    """An exit's head, policy and decision, as a share of one stock layer; rows of 32 tokens."""
    found = {}
    for head in ("linear-cls", "pooler"):
        model = make(shape, head)
        policy, walker = ee.ConfidencePolicy(thresholds=[1.0] * 11), ModelWalker(model)
        for batch in (1, 32):
            hidden, context = walker.begin(equal_rows(batch, 32))
            stock, padded = model.bert.encoder.layer[0], hidden.view(batch, 32, -1)

            def test(walker=walker, hidden=hidden, context=context, policy=policy):
                signal = walker.exit_signal(0, hidden, context)
                policy.step(policy.init_state(len(context.lengths), 2, "cpu"), signal, 0).leave.tolist()

            runs = {"layer": partial(stock, padded, None), "test": test}
            found[f"{head}, batch {batch}"] = ratios(runs, "layer", repeats, 20 if batch == 1 else 4)["test"]
    return found


@torch.inference_mode()
def python_per_layer_call(repeats: int) -> dict:
    """Microseconds of a layer call where there is nothing to compute: 16 rows of 3 tokens, width 12."""
    model = make({"hidden_size": 12, "intermediate_size": 12, "num_attention_heads": 2})
    rows = equal_rows(320, 3)
    policy = spread_out(all_exits(model, rows))
    calls = {}

    class Counting(ModelWalker):
        def run_layer(self, layer, hidden, context):
            calls[self.name] += 1
            return super().run_layer(layer, hidden, context)

    def engine(name, chosen):
        walker = Counting(model)
        walker.name, calls[name] = name, 0
        scheduler = Scheduler(walker, chosen, 48)

        def run():
            calls[name] = 0
            scheduler.run(rows)

        return run

    runs = {"every layer": engine("every layer", None), "early exit": engine("early exit", policy)}
    stock, padded = model.bert.encoder.layer[0], torch.randn(16, 3, 12)
    hidden, context = ModelWalker(model).begin(rows[:16])
    packed = partial(ModelWalker(model).run_layer, 1, hidden, context)
    runs |= {"stock layer alone": partial(stock, padded, None), "packed layer alone": packed}
    times = ratios(runs, "stock layer alone", repeats)
    return {name: found["microseconds"] / calls.get(name, 1) for name, found in times.items()}


def nobody_leaves(shape: dict, repeats: int) -> dict:
    """Every exit asked, nobody leaves: time and peak memory over the same engine without exits."""
    model, rows = make(shape), mixed_rows(64)
    never = ee.ConfidencePolicy(thresholds=[1.0] * 11)
    model.set_exit_policy(never)
    walker, found = ModelWalker(model), {}
    full, asked = Scheduler(walker, None, 512), Scheduler(walker, never, 512)
    assert set(asked.run(rows).exit_index.tolist()) == {11}
    found["batched"] = ratios({"full": partial(full.run, rows), "asked": partial(asked.run, rows)}, "full", repeats)["asked"]
    few = [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows[:8]]

    @torch.inference_mode()
    def one_by_one(call):
        for row in few:
            call(row)

    runs = {
        "full": partial(one_by_one, lambda row: model.classify(model.bert(**row).last_hidden_state)),
        "asked": partial(one_by_one, lambda row: model(**row)),
    }
    found["batch 1, over the stock model"] = ratios(runs, "full", repeats)["asked"]
    peaks = [_peak_bytes(partial(scheduler.run, rows)) for scheduler in (full, asked)]
    found["peak memory"] = {"ratio": [peaks[1] / peaks[0]] * 3, "megabytes": [peak / 2**20 for peak in peaks]}
    return found


def _peak_bytes(run) -> float:
    """Peak resident memory of a child that does this."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        run()
        os.write(write, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return float(pipe.read())


def training_step(shape: dict, repeats: int) -> dict:
    """Forward and backward with twelve exits over those of the stock classifier; 16 rows of 32 tokens."""
    fields = {"num_hidden_layers": 12, "num_labels": 2, **shape}
    exits, stock = make(shape, "linear").train(), BertForSequenceClassification(BertConfig(**fields)).train()
    batch = {"input_ids": torch.randint(1000, 30000, (16, 32)), "labels": torch.randint(2, (16,))}

    def step(model):
        model.zero_grad()
        model(**batch).loss.backward()

    return ratios({"stock": partial(step, stock), "exits": partial(step, exits)}, "stock", repeats)["exits"]


def thresholds_sweep(repeats: int) -> dict:
    """2,000 thresholds for 12 exits and 10,000 rows: cost and quality at once, and as a loop over thresholds."""
    rng = np.random.default_rng(0)
    scores, quality = rng.random((10_000, 12)), rng.integers(0, 2, (10_000, 12)).astype(float)
    cost = np.broadcast_to(np.arange(1.0, 13.0), scores.shape)
    thresholds = np.sort(rng.random(2000))
    rows = np.arange(len(scores))

    def loop(some):
        means = []
        for threshold in some:
            reached = scores >= threshold
            reached[:, -1] = True
            taken = reached.argmax(1)
            means.append([cost[rows, taken].mean(), quality[rows, taken].mean()])
        return np.array(means).T

    some = np.arange(0, 2000, 50)
    fast = np.array(sweep(scores, [cost, quality], thresholds))
    times = ratios(
        {
            "sweep": partial(sweep, scores, [cost, quality], thresholds),
            "loop, 40 thresholds": partial(loop, thresholds[some]),
        },
        "sweep",
        repeats,
    )
    return {
        "milliseconds": times["sweep"]["microseconds"] / 1000,
        "loop over sweep": 50 * times["loop, 40 thresholds"]["ratio"][1],
        "largest_difference": float(np.abs(fast[:, some] - loop(thresholds[some])).max()),
    }


def papers_loop(shape: dict, repeats: int, count: int = 32) -> dict:
    """Rows one by one, padded to 128, stock layers, stop where the exit says so: over our engine, same exits."""
    model, rows = make(shape), mixed_rows(count)
    trace = all_exits(model, mixed_rows(400))
    policy = spread_out(trace)
    small = ee.quantize_int8(model)
    padded = []
    for row in rows:
        missing = 128 - len(row["input_ids"])
        mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * missing])
        padded.append({"input_ids": torch.tensor([row["input_ids"] + [0] * missing]), "attention_mask": mask})

    @torch.inference_mode()
    def loop():
        layers = []
        for batch in padded:
            hidden, context = model.family.begin(model.bert, batch, {})
            for index, layer in enumerate(model.bert.encoder.layer):
                hidden = layer(hidden, context.mask)
                signal = model.exit_signal(index, hidden, context)
                if bool(policy.step(policy.init_state(1, 2, "cpu"), signal, index).leave.all()):
                    break
            layers.append(index)
        return layers

    engines = {name: Scheduler(ModelWalker(one), policy, 512) for name, one in (("torch", model), ("int8", small))}
    same = torch.tensor(loop()) == engines["torch"].run(rows).exit_index
    runs = {"loop": loop} | {name: partial(engine.run, rows) for name, engine in engines.items()}
    times = ratios(runs, "loop", repeats)
    found = {name: [1 / share for share in times[name]["ratio"][::-1]] for name in engines}
    return {**found, "rows": count, "same exits": float(same.float().mean()), "turns": repeats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="bert")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[args.shape]
    found = {
        "exit test over a stock layer": exit_tests(shape, 2 * args.repeats),
        "microseconds of a layer call": python_per_layer_call(2 * args.repeats),
        "nobody leaves": nobody_leaves(shape, args.repeats),
        "training step": training_step(shape, args.repeats),
        "2,000 thresholds": thresholds_sweep(args.repeats),
        "papers' loop": papers_loop(shape, max(args.repeats // 2, 1)),
        "environment": environment(),
    }
    print(json.dumps(found, indent=1))
    add_results({"costs": {args.shape: found}})


if __name__ == "__main__":
    main()
