"""Requests as they come, one text each, against servers with and without early exit, on this machine alone.

    HF_EARLYEXIT_DATA=../shared/data python benchmarks/load.py                # writes results/load.json and its page
    HF_EARLYEXIT_DATA=../shared/data python benchmarks/load.py --equal 10000  # adds whether the engine answers as predict

Every contestant is one process with one thread behind the same FastAPI and uvicorn. Its capacity is what 32 clients that
never wait get out of it; then texts of SST-2 arrive at random (Poisson) at shares of the capacity of the best full-depth
rival of the same precision. A latency counts from the moment of arrival, not of sending. The run is bounded in time.

Without `--model`, the layers are bge-small's (12 x 384), heads are untrained, and thresholds are set so that rows leave
after about 6 of 12 layers: good enough to time, not to judge answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from load_page import page

ROOT = Path(__file__).parent
RESULTS, PAGE = ROOT / "results" / "load.json", ROOT.parent / "docs" / "results-serving.md"
FLOAT, INT8 = "float32", "8 bits"
CONTESTANTS = {  # name: precision, whether it leaves early
    "pipeline": (FLOAT, False),
    "batcher": (FLOAT, False),
    "engine": (FLOAT, True),
    "onnx-batcher": (INT8, False),
    "onnx-engine": (INT8, True),
}
SHARES = (0.3, 0.6, 0.9, 1.3, 1.8)
CLIENTS, TIMEOUT = 32, 10.0


async def ask(connections: list[Any], port: int, body: bytes) -> int:
    """The status of one request, over a connection that is kept; 0 for none in time."""
    reader, writer = connections.pop() if connections else await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/classify HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    try:
        writer.write(head.encode() + body)
        async with asyncio.timeout(TIMEOUT):
            headers = await reader.readuntil(b"\r\n\r\n")
            length = int(headers.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
    except (TimeoutError, OSError, asyncio.IncompleteReadError):
        writer.close()
        return 0
    connections.append((reader, writer))
    return int(headers.split(b" ", 2)[1])


async def closed_loop(port: int, bodies: list[bytes], clients: int, seconds: float) -> dict[str, Any]:
    """Clients that each send the next request when they have the answer to the last."""
    connections: list[Any] = []
    took: list[float] = []
    ends_at = time.perf_counter() + seconds

    async def client(number: int) -> None:
        chosen = random.Random(number)
        while (start := time.perf_counter()) < ends_at:
            assert await ask(connections, port, chosen.choice(bodies)) == 200
            took.append(time.perf_counter() - start)

    start = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    return {"rows_per_second": len(took) / (time.perf_counter() - start), **quantiles(took)}


async def poisson(port: int, bodies: list[bytes], rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Requests that arrive at random, whether or not earlier ones are answered."""
    chosen, connections, took = random.Random(seed), [], []
    refused = failed = 0

    async def one(due: float) -> None:
        nonlocal refused, failed
        status = await ask(connections, port, chosen.choice(bodies))
        refused += status in (429, 503)
        failed += status not in (200, 429, 503)
        if status == 200:
            took.append(time.perf_counter() - due)

    start, due, tasks = time.perf_counter(), 0.0, []
    while (due := due + chosen.expovariate(rate)) < seconds:
        await asyncio.sleep(max(start + due - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(one(start + due)))
    await asyncio.gather(*tasks)
    sent = len(tasks)
    return {
        "rate": rate,
        "sent": sent,
        "refused": refused / max(sent, 1),
        "failed": failed / max(sent, 1),
        "answered_per_second": len(took) / (time.perf_counter() - start),
        **quantiles(took),
    }


def quantiles(seconds: list[float]) -> dict[str, float | None]:
    """Milliseconds at 50, 95 and 99 %."""
    if not seconds:
        return {"p50": None, "p95": None, "p99": None}
    return {f"p{share}": float(np.percentile(seconds, share)) * 1000 for share in (50, 95, 99)}


class Server:
    """A contestant in a process of its own."""

    def __init__(self, name: str, work: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, str(ROOT / "load_servers.py"), name, "--work", str(work), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        ends_at = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if self.process.poll() is not None or time.monotonic() > ends_at:
                    self.process.kill()
                    raise SystemExit(f"{name} does not start: {self.process.communicate()[1][-2000:]}") from None
                time.sleep(0.1)

    def cpu_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def measure(servers: dict[str, Server], bodies: list[bytes], seconds: float) -> dict[str, Any]:
    """Every contestant in turn, with the same arrivals."""
    found: dict[str, Any] = {}
    for name, server in servers.items():
        await closed_loop(server.port, bodies, 4, 1.0)  # warm
        alone = await closed_loop(server.port, bodies, 1, seconds / 2)
        before = server.cpu_seconds()
        full = await closed_loop(server.port, bodies, CLIENTS, seconds)
        spent = server.cpu_seconds() - before
        full["rows_per_cpu_second"] = full["rows_per_second"] * seconds / spent
        found[name] = {"precision": CONTESTANTS[name][0], "early": CONTESTANTS[name][1], "alone": alone, "capacity": full}
        print(f"{name}: {full['rows_per_second']:.0f} rows/s, {full['rows_per_cpu_second']:.0f} a CPU second", flush=True)
    for precision in dict.fromkeys(precision for precision, _ in CONTESTANTS.values()):
        names = [name for name in servers if CONTESTANTS[name][0] == precision]
        best = max(
            (name for name in names if not CONTESTANTS[name][1]),
            key=lambda name: found[name]["capacity"]["rows_per_second"],
        )
        for number, share in enumerate(SHARES):
            for name in names:
                rate = share * found[best]["capacity"]["rows_per_second"]
                before = servers[name].cpu_seconds()
                run = await poisson(servers[name].port, bodies, rate, seconds, number)
                run |= {"share": share, "cpu_seconds": servers[name].cpu_seconds() - before}
                found[name].setdefault("arrivals", []).append(run)
                print(
                    f"{name} at {share:.0%} of {best}: p95 {run['p95'] or 0:.0f} ms, {run['refused']:.0%} refused",
                    flush=True,
                )
    for name, server in servers.items():
        before, start = server.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(1.0)
        found[name]["idle_cpu_share"] = (server.cpu_seconds() - before) / (time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a trained BERT with exits, a policy and a tokenizer")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement; there are 35")
    parser.add_argument("--equal", type=int, default=0, help="rows whose answers by the engine are compared with predict's")
    args = parser.parse_args()
    from load_servers import compare, environment, prepare

    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with TemporaryDirectory() as folder:
        work = Path(folder)
        texts = prepare(work, args.model)
        if args.equal:
            known["equal"] = compare(work, args.equal)
            print(known["equal"])
        else:
            bodies = [json.dumps({"inputs": [text]}).encode() for text in texts]
            servers: dict[str, Server] = {}
            try:
                for name in CONTESTANTS:
                    servers[name] = Server(name, work)
                load = psutil.getloadavg()[0]
                found = asyncio.run(measure(servers, bodies, args.seconds))
            finally:
                for server in servers.values():
                    server.stop()
            known |= {"environment": environment(), "load_average": [load, psutil.getloadavg()[0]], "servers": found}
            known |= {"seconds": args.seconds, "clients": CLIENTS, "model": "trained" if args.model else "untrained heads"}
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if "servers" in known:
        PAGE.write_text(page(known))


if __name__ == "__main__":
    main()
