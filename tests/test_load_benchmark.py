"""What the page of serving under load makes of measured cells."""

import asyncio
import importlib
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


TWO = """
import subprocess, sys
code = "import time\\nwhile time.process_time() < 0.3: pass\\nprint(flush=True); time.sleep(60)"
subprocess.run([sys.executable, "-c", code])
"""  # a process that waits for another, which computes for 0.3 seconds


@pytest.fixture
def load_page(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("load_page")


def cell(rate, p95, refused=0.0, failed=0.0, share=0.3):
    times = {"p50": None if p95 is None else p95 / 2, "p95": p95, "p99": None if p95 is None else p95 * 2}
    counts = {"sent": 100, "refused": refused, "failed": failed, "rows_per_cpu_second": 50.0}
    return {"share": share, "rate": rate, **counts, **times}


def test_quantiles_are_times_of_requests(load_page):
    hundred = [number / 1000 for number in range(100, 0, -1)]
    assert load_page.quantiles(hundred) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert load_page.quantiles([0.003]) == {"p50": 3.0, "p95": 3.0, "p99": 3.0}
    assert load_page.quantiles([0.001, 0.002, 0.003]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0}
    assert load_page.quantiles([]) == {"p50": None, "p95": None, "p99": None}


def test_the_rate_within_a_limit_lies_between_measured_rates(load_page):
    cells = [cell(10, 20.0), cell(20, 40.0), cell(40, 160.0)]
    assert load_page.rate_within(cells, 80) == (pytest.approx(30), False)  # half way from 40 to 160 on their scale
    assert load_page.rate_within(cells, 40) == (pytest.approx(20), False)
    assert load_page.rate_within(cells, 160) == (40, True)
    assert load_page.rate_within(cells, 10) is None
    assert load_page.rate_within([], 10) is None


def test_requests_that_were_refused_or_failed_are_never_in_time(load_page):
    for misses in ({"refused": 0.011}, {"failed": 0.011}, {"refused": 0.006, "failed": 0.006}):
        assert load_page.rate_within([cell(10, 20.0), cell(20, 21.0, **misses)], 80) == (10, False)
    assert load_page.rate_within([cell(10, 20.0), cell(20, None, failed=1.0)], 80) == (10, False)
    assert load_page.rate_within([cell(10, 20.0), cell(20, 21.0, refused=0.005, failed=0.005)], 80) == (20, True)
    assert all(map(load_page.overloaded, [cell(9, 1001), cell(9, 9, 0.11), cell(9, None, failed=1.0)]))
    assert not load_page.overloaded(cell(9, 999, 0.1))


def test_the_page_takes_ratios_turn_by_turn_over_the_best_rival_of_each(load_page):
    turns = {
        "pipeline": [[cell(10, 50.0), cell(30, 5000.0)], [cell(10, 100.0), cell(30, 9000.0)]],
        "torch-batcher": [[cell(10, 25.0), cell(30, 400.0)], [cell(10, 101.0)]],
        "torch-engine": [[cell(10, 25.0), cell(60, 100.0), cell(90, 300.0)], [cell(10, 99.0), cell(30, 101.0)]],
    }
    capacity = {"rows_per_second": 40.0, "rows_per_cpu_second": 50.0}
    servers = {}
    for name, arrivals in turns.items():
        for cells in arrivals:
            for share, one in zip((0.3, 0.9, 1.3), cells, strict=False):
                one["share"] = share
        precision, kind, _ = load_page.CONTESTANTS[name]
        faster = {key: value * (2 if kind == load_page.EARLY else 1) for key, value in capacity.items()}
        servers[name] = {"precision": precision, "kind": kind, "arrivals": arrivals, "capacity": [faster] * 2,
                         "alone": [{"p50": 10.0}, {"p50": 20.0}], "idle_cpu_share": 0.001}  # fmt: skip
    where = {"machine": "Linux", "cpu": "AVX2", "cores": 2}
    where["versions"] = {"torch": "1", "transformers": "2", "onnxruntime": "3"}
    results = {"environment": where, "servers": servers, "load_average": [0.1, 1.2], "seconds": 8.0, "turns": 2,
               "texts": 872, "clients": 32, "model": "untrained heads", "mean_layer": {"float32": 6.04}}  # fmt: skip
    text = load_page.page(results)
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| float32")]
    equal = {row[1]: row[3:] for row in rows if len(row) == 7}
    # at 100 ms: 60 over 10 + 20 log(4) / log(16) = 20, then between 10 and 30 over 10
    second = 10 + 20 * math.log(100 / 99) / math.log(101 / 99)
    both = (3.0, second / 10)
    assert equal["100"] == [
        "15",
        "`serve`",
        f"{(60 + second) / 2:.0f}",
        f"{sum(both) / 2:.2f}x ({min(both):.2f}-{max(both):.2f})",
    ]
    assert equal["50"][0] == "15"  # of the one turn in which a rival was within it
    assert [row[4] for row in rows if len(row) == 8] == ["1.00x", "1.00x", "2.00x"]
    assert [row[6] for row in rows if len(row) == 8 and row[1] == "`serve`"] == ["2.07x"]  # 31 over 15
    assert "872 texts; 8 seconds a cell, 2 turns" in text
    assert "(load average 0.1 and 1.2 before and after)" in text
    assert "The same answers" not in text
    equal = {"rows": 10000, "batches": 4321, "other_layer": 0, "other_label": 1, "at_threshold": 2}
    assert "10,000 rows of SST-2" in load_page.page(results | {"equal": equal})
    ray = {"actors": {"rows": 8192, "one": [50.0, 60.0, 40.0], "two": [95.0, 90.0, 78.0],
                      "plain_one": [60.0, 40.0, 50.0], "plain_two": [90.0, 70.0, 80.0]},
           "million": {"rows": 1_000_000, "seconds": 99.6, "mebibytes": [400.2, 401.0]}}  # fmt: skip
    told = load_page.page(results | {"ray": ray})
    assert "50 rows/s by one process, 90 by two on two cores: 1.90x (1.50-1.95 in 3 turns)" in told
    assert "without Ray: 50 rows/s by one, by two 1.60x (1.50-1.75 in 3 turns)" in told
    assert "1,000,000 rows" in told
    assert "took 100 seconds" in told
    assert "tenth by tenth of the run: 400 401." in told
    hold = {"forks": {"processes": 8, "alike": 8}, "fates": {"rows": 22_200, "told": {"good: its own answer": 11_100}},
            "futures": {"rows": 1_000_000, "mebibytes": [480.3, 481.0], "answered": 1_000_000},
            "hang": {"clients": 1000, "answered": 100, "seconds_before_the_first": 5.08, "p50": 1.0, "p95": 31.9, "p99": 40},
            "overload": {"alone": 300, "clients": 64, "rows": 32, "statuses": {"200": 21, "429": 3530}, "after": 200,
                         "refused": {"p50": 3.3, "p95": 12.6, "p99": 13.0}},
            "stop": {"statuses": {"0": 64, "200": 43}, "exit_code": 0}}  # fmt: skip
    told = load_page.page(results | {"hold": hold})
    assert "1,000,000 futures, one after the other; the process held, in MiB, tenth by tenth of the run: 480 481." in told
    assert "good: its own answer 11,100." in told
    assert (
        "200 21 times, 429 3,530 times, where one client alone had 300 answered; a refusal took 3 ms (p50), 13 (p95). "
        "The next request was answered by 200." in told
    )
    assert "Left out" not in text
    assert "processes" not in text.split("## ")[0].replace("one process", "")
    servers["pipeline"]["processes"], servers["torch-engine"]["processes"] = 7, 1
    told = load_page.page(results | {"left_out": {"int8-ray": "not installed"}})
    assert "stock `pipeline` in a FastAPI route (float32): 7 processes. They share the cores" in told
    assert "Left out: full model in ONNX Runtime, Ray Serve (8 bits): not installed." in told
    for name in ("pipeline", "torch-batcher"):
        servers[name]["arrivals"] = [cells[:1] for cells in servers[name]["arrivals"]]
    equal = [line for line in load_page.page(results).splitlines() if line.startswith("| float32 | 100 ")]
    assert [line.split("|")[-2].strip() for line in equal] == ["-"]  # over rivals that might do more there is no ratio


def test_only_servers_that_are_there_take_part(load_page, monkeypatch):
    load_rivals = importlib.import_module("load_rivals")
    monkeypatch.setattr(load_rivals, "find_spec", lambda name: None)
    out = [name for name in load_page.CONTESTANTS if load_rivals.left_out(name, None) == "not installed"]
    assert out == [name for name in load_page.CONTESTANTS if name.endswith(("-ray", "-litserve", "-infinity"))]
    assert len(out) == 6
    monkeypatch.setattr(load_rivals, "find_spec", lambda name: "here")
    assert not any(load_rivals.left_out(name, Path("python")) for name in load_page.CONTESTANTS)


def test_a_server_is_all_of_its_processes(load_page):
    load = importlib.import_module("load")
    server = object.__new__(load.Server)
    with subprocess.Popen([sys.executable, "-c", TWO], stdout=subprocess.PIPE) as server.process:
        server.process.stdout.readline()  # it has computed
        first, second = server.tree()
        assert server.cpu_seconds() >= 0.3 > sum(first.cpu_times()[:2])
        server.signal(signal.SIGSTOP)

        async def at_work():
            async with server.awake():
                return {process.status() for process in server.tree()}

        assert "stopped" not in asyncio.run(at_work())
        while {process.status() for process in (first, second)} != {"stopped"}:
            time.sleep(0.01)
        server.stop()
    assert server.process.returncode == -signal.SIGTERM
    second.wait(30)


def test_the_page_is_that_of_the_results(load_page):
    """There is none before servers have been measured."""
    results, page = BENCHMARKS / "results" / "load.json", BENCHMARKS.parent / "docs" / "results-serving.md"
    measured = json.loads(results.read_text()) if results.exists() else {}
    found = page.read_text(encoding="utf-8") if page.exists() else None
    assert found == (load_page.page(measured) if "servers" in measured else None), "run python benchmarks/load.py"
