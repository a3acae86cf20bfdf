"""Whether every road on a CUDA device is right, and how near it comes to its bound: one run of at most nine minutes.

    python benchmarks/gpu_check.py --output gpu.json
    python benchmarks/gpu_check.py --dry_run  # on a CPU: captures repeat the functions they were given, shapes are tiny

Weights are random, nothing is downloaded. First come checks: attention of rows of all lengths at once is each row's own, and
rows leave where they do on the CPU in float32, whatever runs them (graphs, the first time and replayed; packed rows without
graphs; `forward`), in any company, over any number of lanes, and after weights have changed; a rule that remembers says the
same replayed as before. A row may leave elsewhere only where its score is within rounding of a threshold. Then ratios: the
share of the token-layer bound over our own full engine at 2,048 to 65,536 tokens in flight, and the stock model. Last, where
the time goes: share of the time that the device is busy, launches, waits. The status is 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speed import all_exits, mixed_rows, spread_out
from speed_page import SHAPES
from torch.profiler import ProfilerActivity, profile

import hf_earlyexit as ee
from hf_earlyexit.families.attention import attend_at_once
from hf_earlyexit.families.packed import Packed
from hf_earlyexit.measuring.bench import environment, exits_of
from hf_earlyexit.policies import BeemCostPolicy
from hf_earlyexit.serving.answers import Answers
from hf_earlyexit.serving.batching import pad_batch, sorted_batches
from hf_earlyexit.serving.cuda_graphs import SegmentGraphs
from hf_earlyexit.serving.graph_walker import GraphWalker, walker_for
from hf_earlyexit.serving.predict import Predictions
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.walker import ModelWalker
from hf_earlyexit.timing import seconds_in_turns

MINUTES = 9.0
BUDGETS = (2048, 8192, 16384, 65536)  # tokens in flight
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of a score, between two ways to compute it
ATTENDING: dict[str, dict[str, Any]] = {
    "both ways": {},
    "backwards": {"causal": True},
    "window": {"window": 16},
    "window, backwards": {"window": 16, "causal": True, "scale": 0.1},
}
TINY = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def repeating(body: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """In place of a capture, on a CPU: a replay computes again, into the same outputs."""
    outputs = body()

    def replay() -> None:
        for kept, new in zip(outputs, body(), strict=True):
            if kept is not None:
                kept.copy_(new)

    return replay, outputs


class Check:
    """One run.

    Args:
        dry: on the CPU, with tiny shapes.
        minutes: after which nothing new is begun.
    """

    def __init__(self, dry: bool, minutes: float = MINUTES) -> None:
        self.dry, self.device = dry, torch.device("cpu" if dry else "cuda")
        self.ends_at = time.monotonic() + 60 * minutes
        self.result: dict[str, Any] = {"dry_run": dry, "environment": environment(), "attention": {}, "checks": {}}
        self.result |= {"ratios": {}, "time": {}, "skipped": []}

    def run(self) -> dict[str, Any]:
        """Everything there is time for."""
        shapes = {"tiny": TINY} if self.dry else SHAPES
        for dtype in (torch.float32,) if self.dry else ROUNDING:
            self._unless_late(f"attention in {dtype}", partial(self.attention, dtype))
            self._unless_late(f"checks in {dtype}", partial(self.check, dtype, next(iter(shapes.values()))))
        for name, shape in shapes.items():
            self._unless_late(f"ratios of {name}", partial(self.measure, name, shape))
        wrong = [name for name, found in self.result["checks"].items() if found["elsewhere"]]
        wrong += [name for name, found in self.result["attention"].items() if not found["difference"] <= found["rounding"]]
        return {**self.result, "right": not wrong and bool(self.result["checks"]), "wrong": wrong}

    def _unless_late(self, name: str, part: Callable[[], Any]) -> None:
        if time.monotonic() < self.ends_at:
            part()
        else:
            self.result["skipped"].append(name)

    def attention(self, dtype: torch.dtype) -> None:
        """Attention in one call, against that of runs of equal length on the CPU in float32."""
        lengths, generator = (7, 7, 1, 300, 64, 2), torch.Generator().manual_seed(0)
        parts = [torch.randn(sum(lengths), 4, 32, generator=generator) for _ in range(3)]
        runs = Packed.of(lengths, None, torch.device("cpu"))
        given = [part.to(self.device, dtype) for part in parts]
        bounds = torch.tensor([0, *lengths, 0, 0], device=self.device).cumsum(0)  # two rows without tokens
        for name, way in ATTENDING.items():
            found = attend_at_once(*given, bounds, 512, **way).float().cpu()
            self.result["attention"][f"{str(dtype).removeprefix('torch.')}: attention, {name}"] = {
                "difference": float((found - runs.attend(*parts, **way)).abs().max()), "rounding": ROUNDING[dtype],
            }  # fmt: skip

    def check(self, dtype: torch.dtype, shape: dict[str, int]) -> None:
        """Every road in one dtype, against the CPU in float32 and against each other."""
        rows, cpu = mixed_rows(120 if self.dry else 1500), make(shape)
        trace = all_exits(cpu, rows)
        policy, remembering = spread_out(trace), spread_out(trace, BeemCostPolicy)
        right = Scheduler(ModelWalker(cpu), policy, 512).run(rows)
        model = make(shape).to(self.device, dtype)
        model.set_exit_policy(policy)
        same = partial(self._same, policy, ROUNDING[dtype], str(dtype).removeprefix("torch."))
        graphs = self.walker(model)
        first = Scheduler(graphs, policy, 8192).run(rows)
        same("graphs, first pass, against the CPU in float32", first, right)
        for _ in range(2):  # captured the second time
            replayed = Scheduler(graphs, policy, 8192).run(rows)
        same("graphs, replayed", replayed, first)
        same("packed, without graphs", Scheduler(ModelWalker(model), policy, 8192).run(rows), first)
        for lanes in (1, 3):
            same(f"{lanes} lanes", Scheduler(graphs, policy, 8192, lanes=lanes).run(rows), first)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
        other = Scheduler(graphs, policy, 1024).run([rows[place] for place in order])
        back = torch.tensor(order).argsort()
        other.logits, other.exit_index, other.score = other.logits[back], other.exit_index[back], other.score[back]
        same("other company", other, first)
        same("forward, in arrival order", self._by_forward(model, rows), first)
        before, _, by_graphs = (Scheduler(graphs, remembering, 8192).run(rows) for _ in range(3))
        rule = partial(self._same, remembering, ROUNDING[dtype], str(dtype).removeprefix("torch."))
        rule("a rule that remembers, replayed, against its first pass", by_graphs, before)
        with torch.no_grad():
            model.base_model.encoder.layer[0].output.dense.weight.mul_(1.5)
        changed = Scheduler(ModelWalker(model), policy, 8192).run(rows)
        same("weights changed in place", Scheduler(graphs, policy, 8192).run(rows), changed)

    def _same(self, policy: Any, rounding: float, dtype: str, name: str, found: Answers, right: Answers) -> None:
        """Note down how far answers are from the right ones; those that left elsewhere though no threshold was near."""
        limits = torch.tensor([float("inf") if limit is None else limit for limit in (*policy.thresholds, None)])
        moved = found.exit_index != right.exit_index
        near = [(one.score - limits[one.exit_index]).abs() <= rounding for one in (found, right)]
        self.result["checks"][f"{dtype}: {name}"] = {
            "rows": len(moved),
            "other exit, within rounding": int((moved & (near[0] | near[1])).sum()),
            "elsewhere": int((moved & ~near[0] & ~near[1]).sum()) + int((found.exit_index < 0).sum()),
            "largest difference of logits": float((found.logits - right.logits)[~moved].abs().max()),
        }

    @torch.inference_mode()
    def _by_forward(self, model: Any, rows: Any) -> Answers:
        answers = Answers.blank(len(rows), model.num_labels)
        for start in range(0, len(rows), 32):
            here = slice(start, start + 32)
            output = model(**pad_batch(rows[here]).to(self.device))
            answers.logits[here], answers.score[here] = output.logits.float().cpu(), output.exit_score.float().cpu()
            answers.exit_index[here] = output.exit_layer.cpu() - 1
        return answers

    def measure(self, name: str, shape: dict[str, int]) -> None:
        """Rates of full and early runs, the share of the bound, and where the time goes."""
        rows = mixed_rows(120 if self.dry else 16384)
        model = make(shape)
        policy = spread_out(all_exits(model, rows[:1500]))
        model.to(self.device, torch.float32 if self.dry else torch.bfloat16).set_exit_policy(policy)
        graphs, budgets = self.walker(model), BUDGETS[:1] if self.dry else BUDGETS
        early = {budget: Scheduler(graphs, policy, budget) for budget in budgets}
        full = {budget: Scheduler(graphs, None, budget) for budget in budgets}
        batches = [batch.to(self.device) for _, batch in sorted_batches(rows, 16384)]
        stock: Any = next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers.models."))

        @torch.inference_mode()
        def by_stock() -> None:
            for batch in batches:
                stock.forward(model, **batch)

        ways: dict[str, Callable[[], Any]] = {"stock, sorted": by_stock, "predict": partial(ee.predict, model, rows)}
        ways |= {f"full, {budget} tokens": partial(one.run, rows) for budget, one in full.items()}
        ways |= {f"early, {budget} tokens": partial(one.run, rows) for budget, one in early.items()}
        seconds = self._in_turns(ways, 1 if self.dry else 3)
        answers = early[budgets[-1]].run(rows)
        layers = torch.tensor(model.exit_layers)[answers.exit_index]
        exits = exits_of(model, rows, Predictions(answers.logits, layers, answers.score, answers.reason, {}))
        shares = {
            budget: seconds[f"full, {budget} tokens"] / seconds[f"early, {budget} tokens"] / exits["token_layer_bound"]
            for budget in budgets
        }
        rates = {way: len(rows) / value for way, value in seconds.items()}
        self.result["ratios"][name] = {**exits, "rows_per_second": rates, "share_of_bound": shares}
        self.result["time"][name] = {"early": self._profiled(ways[f"early, {budgets[-1]} tokens"]),
                                     "full": self._profiled(ways[f"full, {budgets[-1]} tokens"])}  # fmt: skip

    def _in_turns(self, ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
        """Median seconds of each way, in random order in every turn; graphs are captured in two turns before."""

        def finished(run: Callable[[], Any]) -> None:
            run()
            self._wait()

        self._wait()
        seconds = seconds_in_turns({way: [partial(finished, run)] for way, run in ways.items()}, turns, warm_up=2)
        return {way: float(times.quantile(0.5)) for way, times in seconds.items()}

    def _profiled(self, run: Callable[[], Any]) -> dict[str, float]:
        kinds = [ProfilerActivity.CPU] if self.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=kinds) as seen:
            start = time.perf_counter()
            run()
            self._wait()
            wall = time.perf_counter() - start
        events = seen.key_averages()
        count = {kind: sum(event.count for event in events if kind in event.key)
                 for kind in ("cudaLaunchKernel", "cudaGraphLaunch", "Synchronize")}  # fmt: skip
        busy = sum(getattr(event, "self_device_time_total", 0) for event in events) / 1e6
        return {"seconds": wall, "device_busy_share": busy / wall, **count}

    def _wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize()

    def walker(self, model: Any) -> GraphWalker:
        """The walker of graphs."""
        walker = GraphWalker(model, SegmentGraphs(repeating)) if self.dry else walker_for(model)
        assert isinstance(walker, GraphWalker)  # a plain model on CUDA
        return walker


def make(shape: dict[str, int]) -> Any:
    """A model of 12 layers with random weights, always the same."""
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(num_hidden_layers=12, num_labels=2, exit_head="linear-cls", **shape)
    return ee.EarlyExitBertForSequenceClassification(config).eval()


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which nothing new is begun")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(words)
    if not args.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device here: run it where there is one, or with --dry_run.", file=sys.stderr)
        return 2
    result = Check(args.dry_run, args.minutes).run()
    text = json.dumps(result, indent=1)
    print(text)
    if args.output is not None:
        args.output.write_text(text + "\n", encoding="utf-8")
    return 0 if result["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
