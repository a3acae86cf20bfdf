"""Calibration keeps no second copy of a trace, whatever of its rows it looks at."""

import json
import os
import subprocess
import sys

import pytest

MOST = 1.2  # of the trace
RUNS = """
import ctypes, gc, json, warnings
import torch
from hf_earlyexit.calibration import Certified, MaxDrop, calibrate, copies
from hf_earlyexit.policies import scanning
from hf_earlyexit.trace import ExitTrace

ROWS, EXITS, CLASSES = 8000, 12, 150
scanning.SCANNED = copies.SCANNED = 256  # rows at a time; they are few here
warnings.simplefilter("ignore")


def wide_trace(rows):
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (rows,), generator=draw)
    logits = torch.empty(rows, EXITS, CLASSES).normal_(generator=draw)
    logits[torch.arange(rows), :, labels] += torch.linspace(1, 6, EXITS)
    return ExitTrace(logits=logits, labels=labels, exit_layers=tuple(range(1, EXITS + 1)))


def memory(of):  # bytes that the process has (VmRSS), or the most that it has had (VmHWM)
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(of)) * 1024


trace, small, found = wide_trace(ROWS), wide_trace(600), {}
size = trace.logits.numel() * trace.logits.element_size()
for name, policy, target, options in (
    ("one threshold", "confidence", MaxDrop(0.01), {}),
    ("per exit", "confidence", MaxDrop(0.01), {"per_exit": True}),
    ("counts", "patience", MaxDrop(0.01), {"per_exit": True}),
    ("learned", "beem-calibrated", MaxDrop(0.01), {}),
    ("certified", "confidence", Certified(0.05, 0.9), {}),
    ("learned, certified", "beem-calibrated", Certified(0.05, 0.9, risk="harm"), {}),
    ("disagreement", "confidence", Certified(0.05, 0.9, risk="disagreement"), {}),
    ("no mean", "patience", MaxDrop(0.01), {"metric": "f1-macro"}),
):
    calibrate(small, policy, target, folds=2, **options)  # loads what is loaded once
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is that of now
    before = memory("VmRSS")
    calibrate(trace, policy, target, folds=2, **options)
    found[name] = 1 + (memory("VmHWM") - before) / size
print(json.dumps(found))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from /proc")
def test_a_wide_trace_is_in_memory_once():
    apart = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # room that is given back is not kept, which would hide what is taken
    told = subprocess.run(
        [sys.executable, "-c", RUNS], stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **apart}
    )
    found = json.loads(told.stdout)
    assert len(found) == 8
    assert not {name: share for name, share in found.items() if share >= MOST}, found
