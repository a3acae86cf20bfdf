"""Where the time of full and of early runs goes, token by token and layer by layer.

    OMP_NUM_THREADS=1 python benchmarks/speed_profile.py --shape minilm

adds it to benchmarks/results/speed.json and makes docs/how-to/speed.md anew. Time is the CPU time of one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from speed import all_exits, mixed_rows, spread_out
from speed_costs import make
from speed_page import SHAPES, add_results

import hf_earlyexit as ee
from hf_earlyexit.measuring.bench import environment
from hf_earlyexit.serving import chunks, course, scheduler
from hf_earlyexit.serving.bf16 import to_bf16
from hf_earlyexit.serving.int8 import PLAIN
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.timing import seconds_in_turns

TOKENS = 512
SIZES = (512, 1024, 2048)  # rows of the products that tell the peak
WIDE = 2048


class Clock:
    """Seconds by name, every layer call (depth, context, tokens), and in which numbers states stand."""

    def __init__(self) -> None:
        self.seconds, self.calls, self.dtype = Counter(), [], torch.float32

    def timed(self, name, call, *args):
        start = time.thread_time()
        result = call(*args)
        self.seconds[name] += time.thread_time() - start
        return result


class TimedWalker(ModelWalker):
    """Tells a clock what it does."""

    def __init__(self, model, clock: Clock) -> None:
        super().__init__(model)
        self.clock = clock

    def begin(self, rows):
        return self.clock.timed("embeddings", super().begin, rows)

    def run_layer(self, layer, hidden, context):
        self.clock.calls.append((layer, context, len(hidden)))
        self.clock.dtype = hidden.dtype
        return self.clock.timed("layers", super().run_layer, layer, hidden, context)

    def exit_signal(self, *args):
        return self.clock.timed("exits", super().exit_signal, *args)


@contextmanager
def rows_moved_on(clock: Clock):
    """The clock is told how long rows are moved."""
    timed = partial(partial, clock.timed, "dropping and joining rows")
    with (
        patch.object(scheduler, "some_rows", timed(chunks.some_rows)),
        patch.object(course, "join_chunks", timed(chunks.join_chunks)),
    ):
        yield


def once(model, rows, policy) -> tuple[dict, Clock]:
    """Microseconds of a token in a layer, by part; all parts make up the whole."""
    clock = Clock()
    start = time.thread_time()
    with rows_moved_on(clock):
        Scheduler(TimedWalker(model, clock), policy, TOKENS).run(rows)
    total, work = time.thread_time() - start, sum(tokens for *_, tokens in clock.calls)
    parts = {name: 1e6 * seconds / work for name, seconds in clock.seconds.items()}
    parts["the rest, the policy among it"] = 1e6 * (total - sum(clock.seconds.values())) / work
    return {"parts": parts, "tokens_of_a_call": work / len(clock.calls)}, clock


def again(walker: ModelWalker, calls: list, dtype: torch.dtype) -> float:
    """Microseconds of a token in the same layer calls, and nothing between them."""
    hidden = torch.randn(max(tokens for *_, tokens in calls), walker.base.config.hidden_size, dtype=dtype)
    start = time.thread_time()
    for layer, context, tokens in calls:
        walker.run_layer(layer, hidden[:tokens], context)
    return 1e6 * (time.thread_time() - start) / sum(tokens for *_, tokens in calls)


def peak(name: str) -> float:
    """The most operations a second that products of wide matrices reach, in 10^9; the best of several sizes and turns."""
    weights = torch.randn(WIDE, WIDE)
    if name == "int8":
        packed = torch.ops.onednn.qlinear_prepack(weights.mul(20).round().clamp(-127, 127).to(torch.int8), None)
        scale, zeros = torch.ones(WIDE), torch.zeros(WIDE, dtype=torch.int32)
        inputs = {count: torch.randint(0, 255, (count, WIDE), dtype=torch.uint8) for count in SIZES}

        def multiply(count: int) -> None:
            torch.ops.onednn.qlinear_pointwise(inputs[count], 1.0, 0, packed, scale, zeros, *PLAIN)

    else:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        linear = torch.nn.Linear(WIDE, WIDE).to(dtype)
        inputs = {count: torch.randn(count, WIDE, dtype=dtype) for count in SIZES}

        def multiply(count: int) -> None:
            linear(inputs[count])

    seconds = seconds_in_turns({count: [partial(multiply, count)] for count in SIZES}, 9, clock=time.thread_time)
    return max(2e-9 * count * WIDE**2 / float(times.min()) for count, times in seconds.items())


def operations(shape: dict[str, int]) -> int:
    """Of the products with weights, for one token in one layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    return 2 * (4 * hidden**2 + 2 * hidden * inner)


@torch.inference_mode()
def profile(shape: str, count: int, repeats: int) -> dict:
    model, rows, models = make(SHAPES[shape]), mixed_rows(count), {}
    for name, one in {"fp32": model, "bf16": to_bf16(model), "int8": ee.quantize_int8(model)}.items():
        policies, walker = {"full": None, "early exit": spread_out(all_exits(one, rows))}, ModelWalker(one)
        turns, most = {way: [] for way in policies}, peak(name)
        for turn in range(1 + repeats):
            for way, policy in policies.items():
                timed, clock = once(one, rows, policy)
                by_size = sorted(clock.calls, key=lambda call: call[2])
                timed["parts"]["layers alone, in the same order"] = again(walker, clock.calls, clock.dtype)
                timed["parts"]["layers alone, by size"] = again(walker, by_size, clock.dtype)
                turns[way] += [timed] if turn else []
        models[name] = {}
        for way, tolds in turns.items():
            names = dict.fromkeys(part for told in tolds for part in told["parts"])
            parts = {part: statistics.median(t["parts"][part] for t in tolds if part in t["parts"]) for part in names}
            reached = 1e-3 * operations(SHAPES[shape]) / parts["layers"]
            models[name][way] = {"tokens_of_a_call": tolds[0]["tokens_of_a_call"], "parts": parts, "peak": most,
                                 "share_of_peak": reached / most}  # fmt: skip
    return {"rows": count, "turns": repeats, "models": models, "environment": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    add_results({"profile": {args.shape: profile(args.shape, args.rows, args.repeats)}})


if __name__ == "__main__":
    main()
