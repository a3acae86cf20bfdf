"""What the load results say, and the docs' page of them."""

from __future__ import annotations

import json
import math
from argparse import ArgumentParser
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent

FLOAT, INT8 = "float32", "8 bits"
RIVAL, OURS_FULL, EARLY = "rival", "ours in full", "early"
CONTESTANTS = {  # name: precision, kind, words
    "pipeline": (FLOAT, RIVAL, "stock `pipeline` in a FastAPI route"),
    "torch-batcher": (FLOAT, RIVAL, "full model in torch, dynamic batches"),
    "onnx-batcher": (FLOAT, RIVAL, "full model in ONNX Runtime, dynamic batches"),
    "onnx-ray": (FLOAT, RIVAL, "full model in ONNX Runtime, Ray Serve"),
    "onnx-litserve": (FLOAT, RIVAL, "full model in ONNX Runtime, LitServe"),
    "torch-infinity": (FLOAT, RIVAL, "full model in torch, infinity"),
    "torch-engine-full": (FLOAT, OURS_FULL, "`serve` with no policy, in full"),
    "torch-engine": (FLOAT, EARLY, "`serve`"),
    "onnx-engine": (FLOAT, EARLY, "`serve` on ONNX files"),
    "int8-batcher": (INT8, RIVAL, "full model in ONNX Runtime, dynamic batches"),
    "int8-ray": (INT8, RIVAL, "full model in ONNX Runtime, Ray Serve"),
    "int8-litserve": (INT8, RIVAL, "full model in ONNX Runtime, LitServe"),
    "int8-infinity": (INT8, RIVAL, "full model in ONNX Runtime, infinity"),
    "int8-engine-full": (INT8, OURS_FULL, "`serve` on ONNX files with no policy, in full"),
    "int8-engine": (INT8, EARLY, "`serve` on ONNX files"),
}
LIMITS = (50, 100, 200)  # ms that p95 may take where requests a second are compared
MISSED = 0.01  # share of requests refused or failed above which no latency counts
HEADER = """# Results of serving under load

Made by `python benchmarks/load.py` from `benchmarks/results/load.json`; no figure is typed by hand.

Texts of SST-2 arrive one to a request, at random (Poisson), at shares of what the best full-depth rival of the same
precision can do. A server's model has one thread; where no other server is named, it is one process behind FastAPI and
uvicorn. A latency counts from the moment of arrival. Dynamic batches hold up to 32 rows, the first of which waits at most
5 ms for others, as in Triton or Ray Serve; where no server is named, they are a few lines of Python, so without what those
cost. `serve` is all of `hf-earlyexit serve`, its metrics and limits included; on ONNX files as with `--performance_hint
latency`, so a row that nobody shares a batch with runs through the one file. In 8 bits `serve` rounds by
[fixed scales](how-to/onnx.md#fixed-scales), the full model as ONNX Runtime's own `quantize_dynamic` makes it.
"""


def add_files(parser: ArgumentParser) -> None:
    """Flags of a benchmark for where its part goes."""
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "load.json", help="a file that is added to")
    parser.add_argument("--page", type=Path, default=ROOT.parent / "docs" / "results-serving.md")


def keep(results: Path, written: Path, found: dict[str, Any]) -> None:
    """Add what was found to the results, and make the page anew where servers were measured."""
    known = json.loads(results.read_text()) | found if results.exists() else found
    results.write_text(json.dumps(known, indent=1) + "\n")
    if "servers" in known:
        written.write_text(page(known))


def quantiles(seconds: list[float]) -> dict[str, float | None]:
    """Milliseconds within which 50, 95 and 99 % were answered: each is the time of one request."""
    ordered = sorted(seconds)
    return {
        f"p{share}": ordered[math.ceil(share / 100 * len(ordered)) - 1] * 1000 if ordered else None for share in (50, 95, 99)
    }


def missed(cell: dict[str, Any]) -> float:
    """Share of the requests that got no answer."""
    return cell["refused"] + cell["failed"]


def overloaded(cell: dict[str, Any]) -> bool:
    """Whether there is nothing to learn from more requests."""
    return missed(cell) > 0.1 or (cell["p95"] or math.inf) > 1000


def rate_within(cells: list[dict[str, Any]], limit: float) -> tuple[float, bool] | None:
    """Requests a second at which p95 reaches the limit, between two measured rates, on a logarithmic scale of times.

    Args:
        cells: of one contestant, by rising rate.
        limit: ms.

    Returns:
        The rate, and whether more may be possible because no higher one was tried; `None` if no rate was within the limit.
    """
    before = None
    for cell in cells:
        late = math.inf if missed(cell) > MISSED or cell["p95"] is None else cell["p95"]
        if late > limit:
            if before is None:
                return None
            share = 0.0 if late == math.inf else math.log(limit / before["p95"]) / math.log(late / before["p95"])
            return before["rate"] + share * (cell["rate"] - before["rate"]), False
        before = cell
    return None if before is None else (before["rate"], True)


def equal_p95(servers: dict[str, Any], precision: str, limit: float) -> list[dict[str, tuple[float, bool]]]:
    """Turn by turn, the requests a second of every contestant of a precision that came within the limit."""
    same = {name: one["arrivals"] for name, one in servers.items() if one["precision"] == precision}
    turns = [
        {name: rate_within(turn, limit) for name, turn in zip(same, cells, strict=True)}
        for cells in zip(*same.values(), strict=True)
    ]
    return [{name: rate for name, rate in turn.items() if rate is not None} for turn in turns]


def page(results: dict[str, Any]) -> str:
    """Markdown of the whole page."""
    where, servers = results["environment"], results["servers"]
    versions = ", ".join(f"{name} {where['versions'][name]}" for name in ("torch", "transformers", "onnxruntime"))
    layers = " and ".join(f"{value:.1f} ({name})" for name, value in results["mean_layer"].items())
    model = (
        f"A trained model; rows leave after {layers} layers in the mean."
        if results["model"] == "trained"
        else "bge-small's layers (12 x 384) with untrained heads, and thresholds that spread rows over the exits: they "
        f"leave after {layers} of 12 layers in the mean. So times are those of such a model, and answers are worth nothing."
    )
    busy = " and ".join(f"{value:.1f}" for value in results["load_average"])
    lines = [
        HEADER,
        f"{model}\n\n{results['texts']} texts; {results['seconds']:g} seconds a cell, {results['turns']} turns, of which "
        f"the median is shown; {where['machine']}, {where['cpu']}, {where['cores']} cores shared by clients and servers "
        f"(load average {busy} before and after). {versions}.\n",
    ]
    lines += processes_words(servers) + left_out_words(results.get("left_out", {}))
    lines += equal_table(servers) + capacity_table(servers, results["clients"]) + arrivals_table(servers)
    if "equal" in results:
        equal = results["equal"]
        lines.append(
            f"\n## The same answers\n\n{equal['rows']:,} rows of SST-2 in random order from four threads, in "
            f"{equal['batches']:,} batches: {equal['other_layer']} left at another layer than in `predict`, and "
            f"{equal['other_label']} got another label. {equal['at_threshold']} more have a score within 1e-5 of the "
            "threshold they left by, where the batch a row is in decides the last digit."
        )
    if "ray" in results:
        lines.append(ray_words(**results["ray"]))
    if "hold" in results:
        lines.append(hold_words(**results["hold"]))
    return "\n".join(lines) + "\n"


def processes_words(servers: dict[str, Any]) -> list[str]:
    """Which servers are more than one process."""
    many = {name: one["processes"] for name, one in servers.items() if one.get("processes", 1) > 1}
    told = "; ".join(f"{CONTESTANTS[name][2]} ({CONTESTANTS[name][0]}): {count} processes" for name, count in many.items())
    return [f"{told}. They share the cores with the clients, and their CPU is that of all of them.\n"] if many else []


def left_out_words(why: dict[str, str]) -> list[str]:
    """Who could not take part."""
    told = "; ".join(f"{CONTESTANTS[name][2]} ({CONTESTANTS[name][0]}): {reason}" for name, reason in why.items())
    return [f"Left out: {told}.\n"] if why else []


def hold_words(forks: dict, fates: dict, futures: dict, hang: dict, overload: dict, stop: dict) -> str:
    """What `load_hold.py` found."""
    told = "; ".join(f"{kind} {count:,}" for kind, count in fates["told"].items())
    held = " ".join(f"{value:.0f}" for value in futures["mebibytes"])
    return (
        "\n## Under pressure\n\nA small random model. Made by `python benchmarks/load_hold.py`, which fails where something "
        "is lost or given to another.\n\n"
        f"- {futures['rows']:,} futures, one after the other; the process held, in MiB, tenth by tenth of the run: {held}.\n"
        f"- {fates['rows']:,} rows from four threads, and what became of them: {told}.\n"
        f"- {overload['clients']} clients that never wait, {overload['rows']} rows each, at a queue of 64: "
        f"{_statuses(overload)}, where one client alone had {overload['alone']:,} answered; a refusal took "
        f"{overload['refused']['p50']:.0f} ms (p50), {overload['refused']['p95']:.0f} "
        f"(p95). The next request was answered by {overload['after']}.\n"
        f"- SIGTERM in the middle of as many: {_statuses(stop)}. 0 is a client that was let in no more, each once.\n"
        f"- {hang['clients']:,} clients that hang, twice as many as it can have files open: others were let in after "
        f"{hang['seconds_before_the_first']:.1f} seconds (`--max_seconds 5`) and answered in {hang['p95']:.0f} ms (p95).\n"
        f"- {forks['alike']} of {forks['processes']} processes that were forked once the model had answered answer alike."
    )


def _statuses(found: dict[str, Any]) -> str:
    return ", ".join(f"{status} {count:,} times" for status, count in found["statuses"].items())


def _ratio(more: list[float], less: list[float]) -> str:
    """Turn by turn: the median, and the lowest and highest."""
    ratios = [first / second for first, second in zip(more, less, strict=True)]
    return f"{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f} in {len(ratios)} turns)"


def ray_words(actors: dict[str, Any], million: dict[str, Any]) -> str:
    """What `load_ray.py` measured."""
    one, two, plain = (median(actors[name]) for name in ("one", "two", "plain_one"))
    ratio, plain_ratio = (_ratio(actors[f"{name}two"], actors[f"{name}one"]) for name in ("", "plain_"))
    held = " ".join(f"{value:.0f}" for value in million["mebibytes"])
    return (
        f"\n## Many rows, by Ray\n\n{actors['rows']:,} texts of SST-2 through `ee.ray.predict`, the float32 model of above: "
        f"{one:.0f} rows/s by one process, {two:.0f} by two on two cores: {ratio}. Plain processes that share the same "
        f"blocks without Ray: {plain:.0f} rows/s by one, by two {plain_ratio}; that is what the second core adds here.\n\n"
        f"{million['rows']:,} rows of one to eight words through a process "
        f"with a small model took {million['seconds']:.0f} seconds; the process held, in MiB, tenth by tenth of the run: "
        f"{held}. Made by `python benchmarks/load_ray.py`."
    )


def equal_table(servers: dict[str, Any]) -> list[str]:
    lines = [
        "## Requests a second at equal p95\n",
        f"Between rates that were measured; where more than {MISSED:.0%} of requests were refused or late, no time counts. "
        "The ratio is taken turn by turn: the median, and the lowest and highest.\n",
        "| precision | p95 at most, ms | best in full | requests/s | server | requests/s | over the best in full |",
        "|---|---|---|---|---|---|---|",
    ]
    for precision in dict.fromkeys(one["precision"] for one in servers.values()):
        for limit in LIMITS:
            turns = equal_p95(servers, precision, limit)
            rivals = [{name: rate for name, rate in turn.items() if servers[name]["kind"] == RIVAL} for turn in turns]
            best = [max(turn.items(), key=lambda pair: pair[1], default=("", None)) for turn in rivals]
            known = [rate[0] for _, rate in best if rate is not None]
            rival = f"{median(known):.0f}" if known else "-"
            words = " / ".join(dict.fromkeys(CONTESTANTS[name][2] for name, _ in best if name)) or "none"
            for name in (name for name, one in servers.items() if one["precision"] == precision and one["kind"] != RIVAL):
                both = [(turn[name], rate) for turn, (_, rate) in zip(turns, best, strict=True) if name in turn and rate]
                both = [(rate, other) for rate, (other, more) in both if not more]  # who could do more is no measure
                mark = "at least " if any(more for (_, more), _ in both) else ""
                ratios = [rate / other for (rate, _), other in both]
                ours = f"{mark}{median(rate for (rate, _), _ in both):.0f}" if both else "-"
                ratio = f"{mark}{median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if both else "-"
                what = f"{CONTESTANTS[name][2]} | {ours} | {ratio}"
                lines.append(f"| {precision} | {limit} | {words} | {rival} | {what} |")
    return lines


def capacity_table(servers: dict[str, Any], clients: int) -> list[str]:
    lines = [
        f"\n## What each can do\n\n{clients} clients that never wait; one alone; 30 % arriving at random; nobody.\n",
        "| precision | server | rows/s | rows per CPU second | over the best in full | one client: p50, ms | at 30 %: p50, "
        "times that | idle: CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in servers.items():
        same = [other for other in servers.values() if (other["precision"], other["kind"]) == (one["precision"], RIVAL)]
        a_second, alone = of_turns(one["capacity"], "rows_per_cpu_second"), of_turns(one["alone"], "p50")
        best = max((of_turns(other["capacity"], "rows_per_cpu_second") for other in same), default=math.nan)
        calm = of_turns([turn[0] for turn in one["arrivals"]], "p50") / alone
        lines.append(
            f"| {one['precision']} | {CONTESTANTS[name][2]} | {of_turns(one['capacity'], 'rows_per_second'):.0f} "
            f"| {a_second:.0f} | {a_second / best:.2f}x | {alone:.1f} | {calm:.2f}x | {one['idle_cpu_share']:.1%} |"
        )
    return lines


def arrivals_table(servers: dict[str, Any]) -> list[str]:
    lines = [
        "\n## As requests come\n\nShares are of the rows/s of the best rival; a server that misses a tenth, or whose "
        "p95 is above a second, is asked no more. Times are of the requests that were answered.\n",
        "| precision | arrivals | server | sent | refused | failed | p50, ms | p95, ms | p99, ms | rows per CPU second |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for precision in dict.fromkeys(one["precision"] for one in servers.values()):
        same = {name: one["arrivals"] for name, one in servers.items() if one["precision"] == precision}
        for share in sorted({cell["share"] for turns in same.values() for turn in turns for cell in turn}):
            for name, turns in same.items():
                cells = [cell for turn in turns for cell in turn if cell["share"] == share]
                if not cells:
                    continue
                times = " | ".join("-" if (at := of_turns(cells, key)) is math.nan else f"{at:.0f}" for key in TIMES)
                lines.append(
                    f"| {precision} | {share:.0%} = {cells[0]['rate']:.0f}/s | {CONTESTANTS[name][2]} "
                    f"| {sum(cell['sent'] for cell in cells)} | {of_turns(cells, 'refused'):.1%} "
                    f"| {of_turns(cells, 'failed'):.1%} | {times} | {of_turns(cells, 'rows_per_cpu_second'):.0f} |"
                )
    return lines


TIMES = ("p50", "p95", "p99")


def of_turns(cells: list[dict[str, Any]], key: str) -> float:
    """The median of the turns that have one."""
    values = [cell[key] for cell in cells if cell[key] is not None]
    return median(values) if values else math.nan
