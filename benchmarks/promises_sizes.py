"""What calibration costs at size, in CPU seconds and memory; called by benchmarks/promises.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_earlyexit.calibration import Certified
from hf_earlyexit.calibration.certify import walk_of_rows
from hf_earlyexit.calibration.risks import Losses

EXITS, TURNS = 12, 3
ALONE = """
import json, resource, sys, time
import torch, transformers
import hf_earlyexit as ee
from hf_earlyexit.calibration import Certified

kind, policy, rows, exits, classes = *sys.argv[1:3], *map(int, sys.argv[3:])
torch.set_num_threads(1)
status = lambda: dict(line.split(":", 1) for line in open("/proc/self/status"))
peak = lambda: int(status()["VmHWM"].split()[0]) * 1024  # unlike ru_maxrss, none of it is the parent's
resident = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
draw = torch.Generator().manual_seed(0)
labels = torch.randint(classes, (rows,), generator=draw)
told = {}
if kind == "collect":
    config = ee.EarlyExitBertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=exits, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=classes, exit_layers=list(range(1, exits + 1)))
    torch.manual_seed(0)
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    texts = [{"input_ids": row} for row in torch.randint(1, 100, (rows, 4), generator=draw).tolist()]
    ee.collect_trace(model, texts[:100], labels=labels[:100].tolist(), progress=False)  # loads what is loaded once
    before, start = resident(), time.process_time()
    trace = ee.collect_trace(model, texts, labels=labels.tolist(), progress=False)
    told = {"collect_seconds": time.process_time() - start, "collect_peak": peak()}
else:
    before = resident()
    logits = torch.empty(rows, exits, classes).normal_(generator=draw)
    logits[torch.arange(rows), :, labels] += torch.linspace(0.5, 4, exits)
    trace = ee.ExitTrace(logits=logits, labels=labels, exit_layers=tuple(range(1, exits + 1)))
target = Certified(0.01, 0.9) if kind == "certify" else ee.MaxDrop(0.01)
start = time.process_time()
ee.calibrate(trace, policy, target, per_exit=kind == "per exit", keep_weak_exits=kind == "collect")
told |= {"seconds": time.process_time() - start, "before": before, "peak": peak()}
print(json.dumps(told | {"trace": trace.logits.numel() * trace.logits.element_size()}))
"""
RUNS = (
    ("collect", "confidence", 67_349, 150),
    ("collect", "confidence", 100_000, 150),
    ("one threshold", "confidence", 100_000, 150),
    ("per exit", "confidence", 100_000, 2),
    ("per exit", "confidence", 100_000, 150),
    ("per exit", "beem-calibrated", 100_000, 2),
    ("per exit", "patience", 100_000, 2),
    ("per exit", "reward", 100_000, 2),
    ("certify", "confidence", 100_000, 150),
)


def certify_seconds(settings: int = 400, rows: int = 100_000) -> dict[str, Any]:
    """Time to walk along the whole of a path whose every setting is certified, so that none is spared."""
    draw = np.random.default_rng(0)
    scores = draw.random((rows, EXITS))
    losses = (draw.random((rows, EXITS)) < 0.001).astype(float)
    losses[:, -1] = 0
    path = np.repeat(np.linspace(1, 0, settings)[:, None], EXITS - 1, 1)
    everyone = {"all rows": np.ones(rows, dtype=bool)}
    seconds = {"settings": settings, "rows": rows, "exits": EXITS, "cores": os.cpu_count(), "loads": [os.getloadavg()[0]]}
    for risk, low in (("harm", 0.0), ("drop", -1.0)):
        gains = (draw.random((rows, EXITS)) < 0.005) * (losses == 0) * (np.arange(EXITS) < EXITS - 1)
        given = losses - gains if low else losses
        start = time.process_time()
        walk = walk_of_rows(
            Certified(0.01, 0.9, risk=risk), Losses(given, low, 1.0), scores, path, everyone, (scores, given)
        )
        assert walk.last_certified() == settings - 1
        seconds[risk] = time.process_time() - start
    return seconds


def sizes() -> Iterator[tuple[str, dict[str, Any]]]:
    """CPU seconds and peak memory of each run, in a process of its own, by name."""
    yield "walk", certify_seconds()
    for kind, policy, rows, classes in RUNS:
        command = [sys.executable, "-W", "ignore", "-c", ALONE, kind, policy, str(rows), str(EXITS), str(classes)]
        turns, loads = [], []
        for _ in range(1 if kind == "collect" else TURNS):
            turns.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
            loads.append(os.getloadavg()[0])
        turns.sort(key=lambda done: done["seconds"])
        seconds, middle = [done["seconds"] for done in turns], turns[len(turns) // 2]
        cell = {"kind": kind, "policy": policy, "rows": rows, "exits": EXITS, "classes": classes, **middle}
        yield f"{kind}|{policy}|{rows}|{classes}", {**cell, "turns": seconds, "loads": loads}
