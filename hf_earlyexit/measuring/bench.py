"""What early exit brings in time, for one model and its rows: every way to run them, measured side by side."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..modeling.protocol import ExitClassifier, ExitModel, Wrapped
from ..serving.graph_walker import walker_for
from ..serving.predict import Predictions, predict
from ..serving.rows import TokenIds
from ..serving.served import served_classifier
from ..timing import seconds_in_turns, timing_of
from ..versions import installed_version
from .ways import EARLY, FORWARD, FULL, ONE_FILE, STOCK, Form, Run, torch_ways

WORTH_IT = 1.05  # times as fast as the fastest full model, at least
PACKAGES = ("hf_earlyexit", "torch", "transformers", "onnxruntime")


def bench(
    models: Mapping[str, Wrapped | Form],
    rows: Sequence[TokenIds],
    *,
    batch_size: int = 32,
    static_layer: int | None = None,
    repeats: int = 3,
    latency_rows: int = 50,
    clock: Callable[[], float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Time every way to run every model, in random turns; ratios are taken turn by turn, so that all suffer alike.

    Args:
        models: classifiers with exits and a policy by name, in torch or in another form (`OnnxForm`); the first is what
            the others are compared with.
        rows: token ids, at least one row.
        batch_size: rows of a batch in arrival order.
        static_layer: where the static model stops; by default the mean exit layer, rounded.
        repeats: turns after one to warm up (two on an accelerator), at least 1.
        latency_rows: rows that are run one by one, by each way one after another; the first of `rows`.
        clock: seconds; the wall clock by default.
        seed: of the turns.

    Returns:
        Plain values: `rows`, `latency_rows` (how many), `turns`, `batch_size`, `exits` (by model), `throughput` and
        `latency` (by model and way), `padded` (why, by torch model whose rows are padded), `advice`, `environment`.
        Speed-ups are over the first model in full: in arrival order (throughput), one by one (latency).

    Raises:
        UsageError: without rows, or for a model without a policy.
    """
    if not rows:
        raise UsageError("There are no rows; expected at least one.", field="rows")
    forms: dict[str, Any] = {name: _form(model) for name, model in models.items()}
    served: dict[str, Any] = {
        name: form if isinstance(form, torch.nn.Module) else form.served for name, form in forms.items()
    }
    many: dict[tuple[str, str], Run] = {}
    single: dict[tuple[str, str], Run] = {}
    few, exits, few_exits = rows[:latency_rows], {}, {}
    for name, model in served.items():
        if model.exit_policy is None:
            raise UsageError(
                f"{name} has no exit policy; calibrate it first and call set_exit_policy.", field="models", value=name
            )
        exits[name] = exits_of(model, rows, predict(model, rows))
        few_exits[name] = exits_of(model, few, predict(model, few))
        stop = static_layer or _nearest_exit(model, exits[name]["mean_layer"])
        form = forms[name]
        ways = torch_ways(form, batch_size, stop) if form is model else form.ways(batch_size, stop)
        many |= {(name, way): run for way, run in ways.many.items()}
        single |= {(name, way): run for way, run in ways.single.items()}
    warm_up = 1 if all(model.device.type == "cpu" for model in served.values()) else 2  # graphs are made the second time
    measure = partial(seconds_in_turns, turns=repeats, warm_up=warm_up, clock=clock, seed=seed)
    throughput = measure({key: [partial(run, rows)] for key, run in many.items()})
    latency = measure({key: [partial(run, [row]) for row in few] for key, run in single.items()}, together=True)
    first = next(iter(served))
    result: dict[str, Any] = {
        "rows": {"count": len(rows), "mean_tokens": statistics.mean(map(walker_for(served[first]).length, rows))},
        "latency_rows": len(few),
        "turns": repeats,
        "batch_size": batch_size,
        "exits": exits,
        "throughput": {name: _table(throughput, name, _reference(many, first), len(rows)) for name in served},
        "latency": {name: _table(latency, name, _reference(single, first), len(few)) for name in served},
        "padded": {name: why for name, model in served.items() if (why := _why_padded(model)) is not None},
    }
    for name in served:
        _add_shares(exits[name], few_exits[name], result["throughput"][name], result["latency"][name])
    return {**result, "advice": advice(result), "environment": environment()}


def _form(model: Wrapped | Form) -> Any:
    """A torch model ready to serve, or another form as it is."""
    return model if hasattr(model, "ways") else served_classifier(model)


def _why_padded(model: Any) -> str | None:
    """Of a torch model; files of ONNX Runtime are padded as they are."""
    if not isinstance(model, torch.nn.Module):
        return None
    served: Any = model
    why: str | None = served.family.why_padded(served.base_model)
    return why


def _reference(ways: Mapping[tuple[str, str], Run], first: str) -> tuple[str, str]:
    """What speed-ups are over: the first model's own full way."""
    return (first, STOCK) if (first, STOCK) in ways else (first, FULL)


def _add_shares(exits: dict[str, float], few_exits: dict[str, float], many: Any, few: Any) -> None:
    """How much of the token-layer bound each way reaches, over the full model in the same format and engine."""
    bound, alone = exits["token_layer_bound"], few[STOCK if STOCK in few else FULL]["seconds"]
    for key, way in (("share_of_bound", EARLY), ("share_of_bound_in_arrival_order", FORWARD)):
        if way in many:
            exits[key] = many[FULL]["seconds"] / many[way]["seconds"] / bound
    fastest = few[ONE_FILE if ONE_FILE in few else FORWARD]["seconds"]
    exits["share_of_bound_at_batch_1"] = alone / fastest / few_exits["token_layer_bound"]


def exits_of(model: ExitClassifier, rows: Sequence[TokenIds], answers: Predictions) -> dict[str, float]:
    """Mean exit layer, layer speed-up, and the token-layer bound: the speed-up if time were tokens times layers alone."""
    depth, layers = model.exit_layers[-1], answers.exit_layer.double()
    tokens = torch.tensor(list(map(walker_for(model).length, rows))).double()
    return {
        "mean_layer": float(layers.mean()),
        "layer_speed_up": float(depth / layers.mean()),
        "token_layer_bound": float(depth * tokens.sum() / (tokens @ layers)),
    }


def advice(result: Mapping[str, Any]) -> str:
    """Which way to run for throughput and which for latency, and by how much; or that early exit is not worth it here.

    Args:
        result: `throughput` and `latency`, as from `bench`.
    """
    many = {(name, way): row["seconds"] for name, ways in result["throughput"].items() for way, row in ways.items()}
    single = {(name, way): row["seconds"] for name, ways in result["latency"].items() for way, row in ways.items()}
    early, full, static = (_fastest(many, kind) for kind in ("early exit", "full", "first "))
    early_1, full_1, static_1 = (_fastest(single, kind) for kind in ("early exit", "full", "first "))
    gain, gain_1 = many[full] / many[early], single[full_1] / single[early_1]
    if max(gain, gain_1) < WORTH_IT:
        return (
            f"Early exit is not worth it here: {gain:.2f}x the throughput of the fastest full model ({_words(full)}) and "
            f"{gain_1:.2f}x its speed row by row ({_words(full_1)}). Too few rows leave early: calibrate for fewer layers, "
            "or run that full model."
        )
    rows = result["throughput"][early[0]][early[1]]["rows_per_second"]
    sentence = (
        f"For throughput run {_words(early)}: {rows:.0f} rows/s, {gain:.2f}x the fastest full model ({_words(full)}). "
        f"For latency run {_words(early_1)}: {result['latency'][early_1[0]][early_1[1]]['p50_ms']:.1f} ms (p50), "
        f"{gain_1:.2f}x the fastest full model ({_words(full_1)})."
    )
    ahead, ahead_1 = many[early] / many[static], single[early_1] / single[static_1]
    return (
        f"{sentence} A model that is cut off has {ahead:.2f}x that throughput ({_words(static)}) and {ahead_1:.2f}x that "
        f"speed row by row ({_words(static_1)}): "
        + ("take it if it is as accurate." if max(ahead, ahead_1) > 1 else "it is no rival.")
    )


def _fastest(seconds: Mapping[tuple[str, str], float], kind: str) -> tuple[str, str]:
    return min((key for key in seconds if key[1].startswith(kind)), key=lambda key: seconds[key])


def _words(key: tuple[str, str]) -> str:
    return f"{key[0]}, {key[1]}"


def environment() -> dict[str, Any]:
    """What a figure depends on."""
    return {
        "machine": f"{platform.system()} {platform.machine()}",
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: number for name in PACKAGES if (number := installed_version(name)) is not None},
    }


def as_table(result: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| model | way | rows/s | speed-up (middle half) | batch 1: p50, p95 ms | batch 1: speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for name in result["throughput"]:
        many, single = result["throughput"][name], result["latency"][name]
        for way in dict.fromkeys((*many, *single)):
            together, alone = "- | -", "- | -"
            if (row := many.get(way)) is not None:
                spread = f"{row['speed_up']:.2f}x ({row['low']:.2f}-{row['high']:.2f})"
                together = f"{row['rows_per_second']:.1f} | {spread}"
            if (row := single.get(way)) is not None:
                alone = f"{row['p50_ms']:.1f}, {row['p95_ms']:.1f} | {row['speed_up']:.2f}x"
            lines.append(f"| {name} | {way} | {together} | {alone} |")
    return "\n".join(lines)


def _nearest_exit(model: ExitModel, layer: float) -> int:
    return min(model.exit_layers, key=lambda exit_layer: abs(exit_layer - layer))


def _table(seconds: Mapping[Any, Tensor], name: str, reference: Any, rows: int) -> dict[str, dict[str, float]]:
    table = {}
    for (owner, way), times in seconds.items():
        if owner != name:
            continue
        timing = timing_of(times, seconds[reference])
        table[way] = {**timing._asdict(), "rows_per_second": rows / timing.seconds}
        if times.shape[1] > 1 or rows == 1:
            p50, p95 = (1000 * times.median(0).values).quantile(torch.tensor([0.5, 0.95], dtype=times.dtype)).tolist()
            table[way] |= {"p50_ms": p50, "p95_ms": p95}
    return table
