"""Requests as they come, one text each, against servers with and without early exit, on this machine alone.

    HF_EARLYEXIT_DATA=../shared/data python benchmarks/load.py --equal 10000  # whether the engine answers as predict
    HF_EARLYEXIT_DATA=../shared/data python benchmarks/load.py

Both add to results/load.json; the second makes the docs' page anew. Every contestant has one thread for its model, and all
but Ray Serve and LitServe are one process. LitServe takes part where it is installed, infinity where `--infinity` names the
Python of an environment that has it. While one is measured, the others are stopped. The capacity of a contestant is what 32
clients that never wait get out of it; then texts of SST-2 arrive at random (Poisson) at shares of the capacity of the best
full-depth rival of the same precision. Everybody gets the same texts at the same moments. A latency counts from the moment
of arrival, not of sending. The run is bounded in time.

Without `--model`, the layers are bge-small's (12 x 384), heads are untrained, and thresholds are set so that rows leave
after about 6 of 12 layers: good enough to time, not to judge answers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import psutil
from load_page import CONTESTANTS, RIVAL, add_files, keep, missed, overloaded, quantiles
from load_rivals import QUEUE, STOCK, infinity_command, left_out

ROOT = Path(__file__).parent
SHARES = (0.3, 0.6, 0.9, 1.1, 1.3, 1.6, 1.9, 2.3, 2.8)
CLIENTS, TIMEOUT = 32, 10.0
HEAD = "POST {} HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1") | {"TOKENIZERS_PARALLELISM": "false"}
OF_INFINITY = {"INFINITY_QUEUE_SIZE": str(QUEUE), "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


class Connections:
    """Kept connections to a server."""

    def __init__(self, port: int, path: str = "/v1/classify") -> None:
        self.port, self.path, self.free = port, path, []

    async def ask(self, body: bytes) -> int:
        """The status of one request; 0 for none in time."""
        writer = None
        try:
            async with asyncio.timeout(TIMEOUT):
                while self.free and self.free[-1][0].at_eof():  # the server has closed it
                    self.free.pop()[1].close()
                reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
                writer.write(HEAD.format(self.path, len(body)).encode() + body)
                headers = await reader.readuntil(b"\r\n\r\n")
                if length := re.search(rb"content-length: *(\d+)", headers.lower()):
                    await reader.readexactly(int(length[1]))
                else:  # in chunks, of which an empty one is the last
                    await reader.readuntil(b"0\r\n\r\n")
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            if writer is not None:
                writer.close()
            return 0
        self.free.append((reader, writer))
        return int(headers.split(b" ", 2)[1])

    def close(self) -> None:
        for _, writer in self.free:
            writer.close()


class Server:
    """A contestant: a process of its own, and those that it starts."""

    def __init__(self, name: str, work: Path, texts: list[str], infinity: Path | None) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        form, _, kind = name.partition("-")
        command = [sys.executable, str(ROOT / "load_servers.py"), name, "--work", str(work), "--port", str(self.port)]
        folder, key, self.path = Path.cwd(), "inputs", "/v1/classify"
        if kind == "infinity" and infinity is not None:
            command = infinity_command(infinity, form, self.port)
            folder, key, self.path = work / STOCK, "input", "/classify"
        self.name, self.log = name, work / f"{name}.log"
        self.bodies = [json.dumps({key: [text]}).encode() for text in texts]
        with self.log.open("w") as file:
            environment = os.environ | ONE_THREAD | OF_INFINITY
            self.process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment)

    async def started(self) -> None:
        """Until it answers."""
        connections, ends_at = Connections(self.port, self.path), time.monotonic() + 180
        while await connections.ask(self.bodies[0]) != 200:
            if self.process.poll() is not None or time.monotonic() > ends_at:
                raise SystemExit(f"{self.name} does not start: {self.log.read_text()[-2000:]}")
            await asyncio.sleep(0.1)
        connections.close()

    def tree(self) -> list[psutil.Process]:
        """All of its processes."""
        first = psutil.Process(self.process.pid)
        return [first, *first.children(recursive=True)]

    def signal(self, number: int) -> None:
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def cpu_seconds(self) -> float:
        """Of all of its processes, and of those that have ended."""
        total = 0.0
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                total += sum(process.cpu_times()[:4])  # in the process and in the system, its own and of ended children
        return total

    async def settle(self) -> None:
        """Until nothing is left of requests that nobody waits for any more."""
        for _ in range(100):
            before = self.cpu_seconds()
            await asyncio.sleep(0.2)
            if self.cpu_seconds() - before <= 0.06:  # the idle ones use up to 0.03
                return

    @asynccontextmanager
    async def awake(self) -> AsyncIterator[None]:
        """It runs in here only, so that it takes no time from others."""
        self.signal(signal.SIGCONT)
        await self.settle()
        yield
        await self.settle()
        self.signal(signal.SIGSTOP)

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.signal(signal.SIGCONT)
        tree = self.tree()
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()


async def closed_loop(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Clients that each send the next request when they have the answer to the last."""
    connections, took, spent = Connections(server.port, server.path), [], server.cpu_seconds()
    start = time.perf_counter()

    async def client(number: int) -> None:
        chosen = random.Random(number)
        while (sent := time.perf_counter()) < start + seconds:
            status = await connections.ask(chosen.choice(server.bodies))
            if status != 200:
                raise SystemExit(f"A request that waits for the one before it was answered by {status}.")
            took.append(time.perf_counter() - sent)

    await asyncio.gather(*map(client, range(clients)))
    rate, spent = len(took) / (time.perf_counter() - start), server.cpu_seconds() - spent
    connections.close()
    return {"rows": len(took), "rows_per_second": rate, "rows_per_cpu_second": len(took) / spent, **quantiles(took)}


async def _until(moment: float) -> None:
    """Sleep; the last milliseconds awake, as a sleep ends at a whole one, and that would count as the server's."""
    while (left := moment - time.perf_counter()) > 0:
        await asyncio.sleep(max(left - 0.002, 0))


async def poisson(server: Server, rate: float, seconds: float, seed: str) -> dict[str, Any]:
    """Requests that arrive at random, whether or not earlier ones are answered."""
    chosen, connections, took, statuses = random.Random(seed), Connections(server.port, server.path), [], []
    spent, start, due, tasks = server.cpu_seconds(), time.perf_counter(), 0.0, []

    async def one(due: float, body: bytes) -> None:
        statuses.append(await connections.ask(body))
        if statuses[-1] == 200:
            took.append(time.perf_counter() - due)

    while (due := due + chosen.expovariate(rate)) < seconds:
        await _until(start + due)
        tasks.append(asyncio.create_task(one(start + due, chosen.choice(server.bodies))))
    await asyncio.gather(*tasks)
    spent, sent = server.cpu_seconds() - spent, max(len(tasks), 1)
    connections.close()
    refused = sum(status in (429, 503) for status in statuses)
    return {
        "rate": rate,
        "sent": len(tasks),
        "refused": refused / sent,
        "failed": (len(tasks) - refused - len(took)) / sent,
        "rows_per_cpu_second": len(took) / spent if spent else None,
        **quantiles(took),
    }


async def measure(servers: dict[str, Server], seconds: float, turns: int) -> dict[str, Any]:
    """Every contestant, turn by turn, in another order each."""
    order = random.Random(0)
    results: dict[str, Any] = {}
    for name, server in servers.items():
        precision, kind, _ = CONTESTANTS[name]
        results[name] = {"precision": precision, "kind": kind, "alone": [], "capacity": [], "arrivals": []}
        async with server.awake():
            await closed_loop(server, 4, min(seconds, 2.0))  # warm
            results[name]["processes"] = len(server.tree())
    for _ in range(turns):
        for name in order.sample(list(servers), len(servers)):
            async with servers[name].awake():
                results[name]["alone"].append(await closed_loop(servers[name], 1, seconds / 2))
                results[name]["capacity"].append(full := await closed_loop(servers[name], CLIENTS, seconds))
            print(
                f"{name}: {full['rows_per_second']:.0f} rows/s, {full['rows_per_cpu_second']:.0f} a CPU second", flush=True
            )
    best: dict[str, float] = {}
    for one in results.values():
        if one["kind"] == RIVAL:
            rate = median(turn["rows_per_second"] for turn in one["capacity"])
            best[one["precision"]] = max(rate, best.get(one["precision"], 0.0))
    for turn in range(turns):
        for one in results.values():
            one["arrivals"].append([])
        for share in SHARES:
            for name in order.sample(list(servers), len(servers)):
                cells = results[name]["arrivals"][-1]
                if (cells and overloaded(cells[-1])) or results[name]["precision"] not in best:
                    continue
                rate = share * best[results[name]["precision"]]
                async with servers[name].awake():
                    cell = await poisson(servers[name], rate, seconds, f"{turn} {share}")
                cells.append({"share": share, **cell})
                print(f"{name} at {share:.0%}: p95 {cell['p95'] or 0:.0f} ms, {missed(cell):.0%} missed", flush=True)
    async with AsyncExitStack() as all_awake:
        for server in servers.values():
            await all_awake.enter_async_context(server.awake())
        before, start = {name: server.cpu_seconds() for name, server in servers.items()}, time.perf_counter()
        await asyncio.sleep(5.0)
        for name, server in servers.items():
            results[name]["idle_cpu_share"] = (server.cpu_seconds() - before[name]) / (time.perf_counter() - start)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a trained BERT with exits, a policy and a tokenizer")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--infinity", type=Path, help="the Python of an environment with infinity-emb")
    parser.add_argument("--equal", type=int, default=0, help="rows whose answers by the engine are compared with predict's")
    add_files(parser)
    args = parser.parse_args()
    from load_servers import compare, environment, prepare

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # every late request holds a connection
    load = psutil.getloadavg()[0]
    with TemporaryDirectory() as folder:
        work = Path(folder)
        texts, mean_layer = prepare(work, args.model, exports=not args.equal)
        if args.equal:
            found = {"equal": compare(work, args.equal)}
            print(found["equal"])
        else:
            out = {name: why for name in args.contestants if (why := left_out(name, args.infinity)) is not None}
            servers: dict[str, Server] = {}
            try:
                for name in (name for name in args.contestants if name not in out):
                    servers[name] = Server(name, work, texts, args.infinity)
                    asyncio.run(servers[name].started())
                results = asyncio.run(measure(servers, args.seconds, args.turns))
            finally:
                for server in servers.values():
                    server.stop()
            found = {"environment": environment(), "load_average": [load, psutil.getloadavg()[0]], "servers": results}
            found |= {"left_out": out, "seconds": args.seconds, "turns": args.turns, "clients": CLIENTS, "texts": len(texts)}
            found |= {"model": "trained" if args.model else "untrained heads", "mean_layer": mean_layer}
    keep(args.results, args.page, found)


if __name__ == "__main__":
    main()
