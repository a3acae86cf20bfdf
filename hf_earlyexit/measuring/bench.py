"""What early exit brings in time, for one model and its rows: every way to run them, measured side by side."""

from __future__ import annotations

import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..serving.batching import pad_batch
from ..serving.graph_walker import walker_for
from ..serving.predict import Predictions, predict
from ..serving.rows import TokenIds
from ..serving.scheduler import Scheduler
from ..serving.served import served_classifier
from ..serving.transfer import finished

STOCK, FULL, EARLY = "full, arrival order", "full", "early exit"
FORWARD, STATIC = "early exit, arrival order", "first {} layers"
Run = Callable[[Sequence[TokenIds]], Any]


def ways_to_run(model: Any, batch_size: int, static_layer: int) -> dict[str, Run]:
    """Ways to answer rows with one model, by name.

    Args:
        model: a classifier with exits and a policy.
        batch_size: rows of a batch in arrival order, padded to the longest.
        static_layer: layers of the model that always stops there, for comparison.
    """
    walker, policy = walker_for(model), model.exit_policy
    budget = walker.best_batch_tokens
    full, early = Scheduler(walker, None, budget), Scheduler(walker, policy, budget)
    static = Scheduler(walker, None, budget, layer_budget=static_layer)

    def in_batches(call: Callable[[dict[str, Any]], Any]) -> Run:
        @torch.inference_mode()
        def run(rows: Sequence[TokenIds]) -> None:
            for start in range(0, len(rows), batch_size):
                call(dict(pad_batch(rows[start : start + batch_size]).to(walker.device)))
            finished(walker.device)

        return run

    return {
        STOCK: in_batches(_stock_forward(model)),
        FULL: full.run,
        FORWARD: in_batches(lambda batch: model(**batch, early_exit=True)),
        EARLY: early.run,
        STATIC.format(static_layer): static.run,
    }


def _stock_forward(model: Any) -> Callable[[dict[str, Any]], Any]:
    """The stock class's own forward, on the very weights: what a plain checkpoint of the family costs."""
    stock = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))
    return lambda batch: stock.forward(model, **batch).logits


def bench(
    models: Mapping[str, Any],
    rows: Sequence[TokenIds],
    *,
    batch_size: int = 32,
    static_layer: int | None = None,
    repeats: int = 3,
    latency_rows: int = 50,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> dict[str, Any]:
    """Time every way to run every model, in random turns; ratios are taken turn by turn, so that all suffer alike.

    Args:
        models: classifiers with exits and a policy, by name; the first is what others are compared with.
        rows: token ids, at least one row.
        batch_size: rows of a batch in arrival order.
        static_layer: where the static model stops; by default the mean exit layer, rounded.
        repeats: turns after one to warm up (two on an accelerator), at least 1.
        latency_rows: rows that are run one by one; the first of `rows`.
        clock: seconds; the wall clock by default.
        seed: of the turns.

    Returns:
        Plain values: `rows`, `exits` (by model), `throughput` and `latency` (by model and way), `advice`, `environment`.
        Speed-ups are over the first model in arrival order (throughput) or one by one (latency).

    Raises:
        UsageError: without rows, or for a model without a policy.
    """
    if not rows:
        raise UsageError("There are no rows; expected at least one.", field="rows")
    models = {name: served_classifier(model) for name, model in models.items()}
    ways: dict[tuple[str, str], Run] = {}
    singles: dict[tuple[str, str], Run] = {}
    exits: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        if model.exit_policy is None:
            raise UsageError(
                f"{name} has no exit policy; calibrate it first and call set_exit_policy.", field="models", value=name
            )
        exits[name] = exits_of(model, rows, predict(model, rows))
        stop = static_layer or _nearest_exit(model, exits[name]["mean_layer"])
        ways |= {(name, way): run for way, run in ways_to_run(model, batch_size, stop).items()}
        one = ways_to_run(model, 1, stop)
        singles |= {(name, way): one[way] for way in (STOCK, FORWARD, STATIC.format(stop))}
    warm_up = 1 if all(model.device.type == "cpu" for model in models.values()) else 2  # graphs are made the second time
    throughput = _in_turns({key: [partial(run, rows)] for key, run in ways.items()}, repeats, clock, seed, warm_up)
    few = rows[:latency_rows]
    latency = _in_turns({key: [partial(run, [row]) for row in few] for key, run in singles.items()},
                        repeats, clock, seed, warm_up)  # fmt: skip
    first = next(iter(models))
    result = {
        "rows": {"count": len(rows), "mean_tokens": statistics.mean(len(row["input_ids"]) for row in rows)},
        "exits": exits,
        "throughput": {name: _table(throughput, name, (first, STOCK), len(rows)) for name in models},
        "latency": {name: _table(latency, name, (first, STOCK), len(few)) for name in models},
    }
    for name in models:
        share = result["throughput"][name]
        few_exits = exits_of(models[name], few, predict(models[name], few))
        for key, way in (("share_of_bound", EARLY), ("share_of_bound_in_arrival_order", FORWARD)):
            exits[name][key] = share[FULL]["seconds"] / share[way]["seconds"] / exits[name]["token_layer_bound"]
        exits[name]["share_of_bound_at_batch_1"] = (
            result["latency"][name][STOCK]["seconds"]
            / result["latency"][name][FORWARD]["seconds"]
            / few_exits["token_layer_bound"]
        )
    return {**result, "advice": {name: advice(result, name) for name in models}, "environment": environment()}


def exits_of(model: Any, rows: Sequence[TokenIds], answers: Predictions) -> dict[str, float]:
    """Mean exit layer, layer speed-up, and the token-layer bound: the speed-up if time were tokens times layers alone."""
    depth, layers = model.exit_layers[-1], answers.exit_layer.double()
    tokens = torch.tensor([len(row["input_ids"]) for row in rows]).double()
    return {
        "mean_layer": float(layers.mean()),
        "layer_speed_up": float(depth / layers.mean()),
        "token_layer_bound": float(depth * tokens.sum() / (tokens @ layers)),
    }


def advice(result: Mapping[str, Any], name: str) -> str:
    """A plain sentence on whether early exit is the right tool."""
    many, few = result["throughput"][name], result["latency"][name]
    static = next(way for way in many if way.startswith("first "))
    over_full = many[FULL]["seconds"] / many[EARLY]["seconds"]
    at_one = few[STOCK]["seconds"] / few[FORWARD]["seconds"]
    over_static = many[static]["seconds"] / many[EARLY]["seconds"]
    if max(over_full, at_one) < 1.05:
        return (
            f"Early exit is the wrong tool here: {over_full:.2f}x the full model's throughput and {at_one:.2f}x its speed "
            "row by row. Too few rows leave early; calibrate for fewer layers, or run the full model sorted by length."
        )
    gain = f"Early exit gives {over_full:.2f}x the throughput of the full model in batches as good, {at_one:.2f}x at batch 1"
    if over_static < 1.0:
        return f"{gain}. A model of the {static} has {1 / over_static:.2f}x its speed: take that one if it is as accurate."
    return f"{gain}, and {over_static:.2f}x that of the {static} alone."


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("hf_earlyexit", "torch", "transformers")},
    }


def as_table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| model | way | rows/s | speed-up (middle half) | batch 1: p50, p95 ms | batch 1: speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for name, ways in result["throughput"].items():
        for way, figures in ways.items():
            one = result["latency"][name].get(way)
            alone = f"{one['p50_ms']:.1f}, {one['p95_ms']:.1f} | {one['speed_up']:.2f}x" if one else "- | -"
            lines.append(
                f"| {name} | {way} | {figures['rows_per_second']:.1f} | "
                f"{figures['speed_up']:.2f}x ({figures['low']:.2f}-{figures['high']:.2f}) | {alone} |"
            )
    return "\n".join(lines)


def _nearest_exit(model: Any, layer: float) -> int:
    return min(model.exit_layers, key=lambda exit_layer: abs(exit_layer - layer))


def _in_turns(
    runs: Mapping[Any, Sequence[Callable[[], Any]]], repeats: int, clock: Callable[[], float], seed: int, warm_up: int = 1
) -> dict[Any, Tensor]:
    """Seconds `[repeats, jobs]` of every list of jobs; each turn runs all first jobs, then all second, in random order."""
    order, seconds = random.Random(seed), {key: [] for key in runs}
    for turn in range(warm_up + repeats):
        times: dict[Any, list[float]] = {key: [] for key in runs}
        for job in range(len(next(iter(runs.values())))):
            for key in order.sample(list(runs), len(runs)):
                start = clock()
                runs[key][job]()
                times[key].append(clock() - start)
        if turn >= warm_up:
            for key, values in times.items():
                seconds[key].append(values)
    return {key: torch.tensor(values) for key, values in seconds.items()}


def _table(seconds: Mapping[Any, Tensor], name: str, reference: Any, rows: int) -> dict[str, dict[str, float]]:
    table = {}
    for (owner, way), times in seconds.items():
        if owner != name:
            continue
        turns = times.sum(1)
        ratios = seconds[reference].sum(1) / turns
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        table[way] = {"seconds": float(turns.median()), "rows_per_second": rows / float(turns.median()),
                      "speed_up": middle, "low": low, "high": high}  # fmt: skip
        if times.shape[1] > 1 or rows == 1:
            p50, p95 = (1000 * times.median(0).values).quantile(torch.tensor([0.5, 0.95])).tolist()
            table[way] |= {"p50_ms": p50, "p95_ms": p95}
    return table
