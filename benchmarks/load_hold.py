"""What must hold under pressure: memory, own answers, a full queue, clients that hang, a stop in the middle, forks.

    python benchmarks/load_hold.py               # minutes; a million rows
    python benchmarks/load_hold.py --share 0.01  # a hundredth of everything: whether it runs

Adds to results/load.json, makes the docs' page anew where `load.py` has written there, and exits with 1 if anything is off.
The model is small and random: nothing here is about what it says or how fast it is.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import torch
from load import Connections
from load_page import add_files, keep, quantiles
from transformers import BertTokenizer

import hf_earlyexit as ee

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(200))]
NEAR, CLIENTS, ROWS, THREADS = 1e-5, 64, 32, 4


def parts() -> tuple[Any, Any]:
    """A small model with a policy, and its tokenizer."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = ee.EarlyExitBertConfig(vocab_size=len(WORDS), num_labels=3, initializer_range=0.1, **shape)
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.6, 0.55, 0.5)))
    return model, BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=512)


def text(number: int) -> str:
    chosen = random.Random(number)
    return " ".join(f"w{chosen.randrange(200)}" for _ in range(chosen.randint(1, 8)))


def futures(count: int) -> dict[str, Any]:
    """Memory of a process whose engine answers so many rows, one future each."""
    model, tokenizer = parts()
    held, process, room = [], psutil.Process(), threading.Semaphore(1000)
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        for number in range(count):
            room.acquire()
            engine.submit(text(number % 1000)).add_done_callback(lambda _: room.release())
            if (number + 1) % max(count // 10, 1) == 0:
                held.append(process.memory_info().rss / 2**20)
    print(f"{count:,} futures; MiB by tenths: {[round(value) for value in held]}", flush=True)
    return {"rows": count, "mebibytes": held, "answered": engine.state.answered}


def fates(cancelled: int, late: int, broken: int) -> dict[str, Any]:
    """Rows that are cancelled, late or broken among as many good ones, from several threads: what each one is told."""
    model, tokenizer = parts()
    kinds = ["good"] * (cancelled + late + broken) + ["cancelled"] * cancelled + ["late"] * late + ["broken"] * broken
    random.Random(0).shuffle(kinds)
    texts = [text(number) for number in range(len(kinds))]
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    thresholds = torch.tensor([value for value in model.exit_policy.thresholds if value is not None])
    near = (expected.exit_score[:, None] - thresholds).abs().amin(1) < NEAR
    got: list[Any] = [None] * len(kinds)
    with ee.Engine(model, tokenizer=tokenizer, max_queue=len(kinds)) as engine:

        def client(part: int) -> None:
            for place in range(part, len(kinds), THREADS):
                row = {"input_ids": [5, 10**6]} if kinds[place] == "broken" else texts[place]
                got[place] = engine.submit(row, deadline=0 if kinds[place] == "late" else None)
                if kinds[place] == "cancelled":
                    got[place].cancel()

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(client, range(THREADS)))
    told: Counter[str] = Counter()
    for place, (kind, future) in enumerate(zip(kinds, got, strict=True)):
        if future.cancelled():
            told[f"{kind}: cancelled"] += 1
        elif (error := future.exception(0)) is not None:
            told[f"{kind}: {type(error).__name__}"] += 1
        elif (answer := future.result(0)).reason == "deadline":
            told[f"{kind}: deadline"] += 1
        else:
            same = answer.exit_layer == expected.exit_layer[place] or bool(near[place])
            told[f"{kind}: {'its own answer' if same else 'another answer'}"] += 1
    print(dict(told), flush=True)
    wrong = {"good: another answer", "cancelled: another answer", "good: cancelled", "broken: its own answer"} & set(told)
    if wrong or told["good: its own answer"] != kinds.count("good") or told["broken: DataError"] != broken:
        raise SystemExit(f"A row was told what is another's: {told}")
    return {"rows": len(kinds), "told": dict(sorted(told.items()))}


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """The port and the process of a server."""
    command = [sys.executable, "-m", "hf_earlyexit.cli.main", "serve", str(folder), "--port", "0", "--device", "cpu", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stderr or ():
                if found := re.search(r"listening at \S+:(\d+)", line):
                    break
            else:
                raise SystemExit("The server does not start.")
            threading.Thread(target=(process.stderr or sys.stdin).read, daemon=True).start()
            yield int(found[1]), process
        finally:
            process.kill()


def body(rows: int) -> bytes:
    return json.dumps({"inputs": [text(number) for number in range(rows)]}).encode()


async def crowd(port: int, seconds: float, on_time: Any = None, clients: int = CLIENTS) -> tuple[Counter[int], list[float]]:
    """Statuses that many clients get who never wait, and seconds that refusals took; 0 is a connection without an answer."""
    connections, statuses, refused = Connections(port), Counter[int](), []
    ends_at, sent = time.perf_counter() + seconds, body(ROWS)

    async def client() -> None:
        while (start := time.perf_counter()) < ends_at:
            status = await connections.ask(sent)
            statuses[status] += 1
            if status == 429:
                refused.append(time.perf_counter() - start)
            if status == 0:
                return

    async def act() -> None:
        await asyncio.sleep(seconds / 2)
        if on_time is not None:
            on_time()

    await asyncio.gather(act(), *(client() for _ in range(clients)))
    connections.close()
    return statuses, refused


def overload(folder: Path, seconds: float) -> dict[str, Any]:
    """What a server with a short queue says to far too many clients, and whether it is well afterwards."""
    with serving(folder, "--max_queue", "64") as (port, _):
        alone, _ = asyncio.run(crowd(port, seconds / 2, clients=1))
        statuses, refused = asyncio.run(crowd(port, seconds))
        after = asyncio.run(Connections(port).ask(body(1)))
    found = {
        "alone": 2 * alone[200],
        "statuses": {str(key): statuses[key] for key in sorted(statuses)},
        "refused": quantiles(refused),
        "after": after,
    }
    print(found, flush=True)
    if after != 200 or set(statuses) - {200, 429, 503} or not statuses[429] or 4 * statuses[200] < found["alone"]:
        raise SystemExit(f"Too many clients were not answered as they should be: {found}")
    return {"clients": CLIENTS, "rows": ROWS, **found}


def stop(folder: Path, seconds: float) -> dict[str, Any]:
    """What clients are told of a server that is told to stop in the middle: answers, or nothing at all."""
    with serving(folder) as (port, process):
        statuses, _ = asyncio.run(crowd(port, seconds, on_time=lambda: process.send_signal(signal.SIGTERM)))
        code = process.wait(120)
    found = {"statuses": {str(key): statuses[key] for key in sorted(statuses)}, "exit_code": code}
    print(found, flush=True)
    if code or not statuses[200] or set(statuses) - {0, 200, 429} or statuses[0] > CLIENTS:
        raise SystemExit(f"A server that stops lost what it had accepted: {found}")
    return found


def hang(folder: Path, count: int) -> dict[str, Any]:
    """Whether clients are answered beside many that hang, with the fewest files that a server can have open."""
    head = b"POST /v1/classify HTTP/1.1\r\nHost: l\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n"
    with serving(folder, "--max_seconds", "5") as (port, process), ExitStack() as stack:
        if hasattr(psutil.Process, "rlimit"):
            psutil.Process(process.pid).rlimit(psutil.RLIMIT_NOFILE, (max(count // 2, 64), max(count // 2, 64)))
        for number in range(count):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall((b"", head[:30], head, head + b"{")[number % 4])
        took, start = [], time.perf_counter()
        while len(took) < 100 and time.perf_counter() < start + 60:
            sent = time.perf_counter()
            if asyncio.run(Connections(port).ask(body(1))) == 200:
                took.append(time.perf_counter() - sent)
            else:
                time.sleep(0.1)
        first = time.perf_counter() - start - sum(took)
    found = {"clients": count, "answered": len(took), "seconds_before_the_first": first, **quantiles(took)}
    print(found, flush=True)
    if len(took) < 100:
        raise SystemExit(f"Clients that hang hold others up: {found}")
    return found


def forks(count: int) -> dict[str, Any]:
    """Whether processes forked from one that has loaded the model, and has answered by another engine, answer alike."""
    model, tokenizer = parts()
    torch.set_num_threads(os.cpu_count() or 1)
    texts = [text(number) for number in range(200)]
    expected = ee.predict(model, texts, tokenizer=tokenizer).exit_layer.tolist()
    engine, alike = ee.Engine(model, tokenizer=tokenizer), 0
    for _ in range(count):
        child = os.fork()
        if not child:
            futures_ = [engine.submit(one) for one in texts]
            os._exit(0 if [future.result(60).exit_layer for future in futures_] == expected else 1)
        alike += os.waitpid(child, 0)[1] == 0
    print(f"{alike} of {count} forked processes answer alike", flush=True)
    if alike != count:
        raise SystemExit("Forked processes do not answer as their parent does.")
    return {"processes": count, "alike": alike}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the counts and seconds")
    add_files(parser)
    args = parser.parse_args()

    def of(count: int) -> int:
        return max(round(args.share * count), 1)

    found = {"forks": forks(max(of(8), 2)), "fates": fates(of(10_000), of(1000), of(100)), "futures": futures(of(1_000_000))}
    with TemporaryDirectory() as folder:
        model, tokenizer = parts()
        ee.save(model, Path(folder) / "model", tokenizer=tokenizer)
        found["hang"] = hang(Path(folder) / "model", max(of(1000), 100))
        found["overload"] = overload(Path(folder) / "model", max(20 * args.share, 3))
        found["stop"] = stop(Path(folder) / "model", max(20 * args.share, 3))
    keep(args.results, args.page, {"hold": found})


if __name__ == "__main__":
    main()
