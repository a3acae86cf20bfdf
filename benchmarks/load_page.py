"""The docs' page of the load results."""

from __future__ import annotations

from typing import Any

WORDS = {
    "pipeline": "stock `pipeline` in a FastAPI route",
    "batcher": "dynamic batches of the full model",
    "engine": "`hf-earlyexit serve`",
    "onnx-batcher": "ONNX Runtime in full, dynamic batches",
    "onnx-engine": "`hf-earlyexit serve` on ONNX files",
}
HEADER = """# Serving under load

Made by `python benchmarks/load.py` from `benchmarks/results/load.json`; no figure is typed by hand.

Texts of SST-2 arrive one to a request, at random, at shares of what the best full-depth rival of the same precision can do.
Every server is one process with one thread behind the same FastAPI. A latency counts from the arrival. Dynamic batches hold
up to 32 rows that wait at most 5 ms for each other, as `@serve.batch` of Ray Serve gathers them, without its proxy.
"""


def page(results: dict[str, Any]) -> str:
    """Markdown of the whole page."""
    where, servers = results["environment"], results["servers"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers", "onnxruntime"))
    busy = " and ".join(f"{value:.1f}" for value in results["load_average"])
    model = (
        "A trained model."
        if results["model"] == "trained"
        else "bge-small's layers (12 x 384) with untrained heads; thresholds let rows leave after about 6 of 12 layers. So "
        "times are those of such a model, and answers are worth nothing."
    )
    lines = [
        HEADER,
        f"{model} {where['cpu']}, {where['cores']} cores, on which clients, servers and other work ran at once (load "
        f"average {busy}): compare within the page, and rather by CPU time. {results['seconds']:g} seconds a cell; "
        f"{versions}.\n",
        f"## What each can do\n\n{results['clients']} clients that never wait; and one alone.\n",
        "| precision | server | rows/s | rows per CPU second | over the best in full | one client: p50 ms | idle: CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in servers.items():
        best = max(
            other["capacity"]["rows_per_cpu_second"]
            for other in servers.values()
            if other["precision"] == one["precision"] and not other["early"]
        )
        full = one["capacity"]
        lines.append(
            f"| {one['precision']} | {WORDS[name]} | {full['rows_per_second']:.0f} | {full['rows_per_cpu_second']:.0f} "
            f"| {full['rows_per_cpu_second'] / best:.2f}x | {one['alone']['p50']:.1f} | {one['idle_cpu_share']:.1%} |"
        )
    lines.append("\n## As requests come\n")
    lines.append(
        "| precision | arrivals | server | sent | refused or late | p50 ms | p95 ms | p99 ms | rows per CPU second |"
    )
    lines.append("|---|---|---|---|---|---|---|---|---|")
    runs = [(one["precision"], run["share"], name, run) for name, one in servers.items() for run in one["arrivals"]]
    order = list(servers)
    for precision, share, name, run in sorted(runs, key=lambda row: (row[0] != "float32", row[1], order.index(row[2]))):
        times = " | ".join("-" if run[key] is None else f"{run[key]:.0f}" for key in ("p50", "p95", "p99"))
        answered = run["sent"] * (1 - run["refused"] - run["failed"])
        lines.append(
            f"| {precision} | {share:.0%} = {run['rate']:.0f}/s | {WORDS[name]} | {run['sent']} "
            f"| {run['refused'] + run['failed']:.1%} | {times} | {answered / max(run['cpu_seconds'], 1e-9):.0f} |"
        )
    if "equal" in results:
        equal = results["equal"]
        lines.append(
            f"\n## The same answers\n\n{equal['rows']:,} rows of SST-2 in random order from four threads, in "
            f"{equal['batches']:,} batches: {equal['other_layer']} left at another layer than in `predict`, and "
            f"{equal['other_label']} got another label. {equal['within_1e-5_of_a_threshold']} more have a score within 1e-5 "
            "of a threshold, where the batch a row is in decides the last digit."
        )
    return "\n".join(lines) + "\n"
