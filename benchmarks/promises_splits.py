"""How often chosen settings keep their word on random splits of real traces; called by benchmarks/promises.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from tasks import DATA
from torch import Tensor

from hf_earlyexit import ExitTrace, FinalLayerError, MaxDrop
from hf_earlyexit.calibration import Certified
from hf_earlyexit.calibration.certify import certify_setting
from hf_earlyexit.calibration.cross_fit import LEAST_ROWS, expect
from hf_earlyexit.calibration.quality_metrics import Accuracy
from hf_earlyexit.calibration.settings import Pool, Recipe, choose, learns, make_policy, split_places
from hf_earlyexit.errors import CalibrationError
from hf_earlyexit.policies.base import POLICIES as REGISTERED
from hf_earlyexit.policies.base import ExitPolicy
from hf_earlyexit.signals import LOGITS

TRACES = Path(__file__).parent / "traces"
POLICIES = ("confidence", "beem-a", "beem-calibrated", "gate", "reward")
RULES: dict[str, tuple[Any, bool]] = {
    "MaxDrop(0)": (MaxDrop(0.0), False),
    "MaxDrop(0, sigmas=1)": (MaxDrop(0.0, sigmas=1.0), False),
    "MaxDrop(0.01)": (MaxDrop(0.01), False),
    "MaxDrop(0.01) per exit": (MaxDrop(0.01), True),
    "FinalLayerError()": (FinalLayerError(), True),
    "Certified(0.01, 0.9)": (Certified(0.01, 0.9), False),
    "Certified(0.01, 0.9) harm": (Certified(0.01, 0.9, risk="harm"), False),
}
UNLABELLED = {
    "MaxDrop(0.01)": (MaxDrop(0.01), False),
    "Certified(0.01, 0.9) disagreement": (Certified(0.01, 0.9, risk="disagreement"), False),
}
EXPECTED = "MaxDrop(0.01)"
LEARNING_SHARE = 0.2


class Task(NamedTuple):
    """Traces of one task, one for each seed of its heads, and how many rows of one choose."""

    name: str
    traces: list[ExitTrace]
    num_choosing: int


def tasks() -> Iterator[Task]:
    """The fine-tuned SST-2 of the data folder, where it is, and the committed traces."""
    path = DATA / "traces" / "sst2_bge-small_mean-pooled.safetensors"
    if path.exists():
        tensors = load_file(path)
        logits, labels = (
            torch.cat([tensors[f"{part}_{what}"] for part in ("heldback", "dev")]) for what in ("logits", "labels")
        )
        layers = tuple(range(1, logits.shape[1] + 1))
        yield Task("sst2 fine-tuned", [ExitTrace(logits=logits.float(), labels=labels.long(), exit_layers=layers)], 3000)
    for name in sorted({path.stem.rsplit("-", 1)[0] for path in TRACES.glob("*-?.safetensors")}):
        loaded = [ExitTrace.load(path) for path in sorted(TRACES.glob(f"{name}-?.safetensors"))]
        traces = [in_float32(trace) for trace in loaded]
        yield Task(name, traces, traces[0].num_rows // 2)


def has_signals(task: Task, policy: str) -> bool:
    """Whether the task's traces hold what a policy asks for."""
    return {*REGISTERED.get(policy).asks} <= {LOGITS, *task.traces[0].scalars}


def in_float32(trace: ExitTrace) -> ExitTrace:
    """The trace as policies take it; files hold float16."""
    scalars = {name: values.float() for name, values in trace.scalars.items()}
    return replace(trace, logits=trace.logits.float(), scalars=scalars)


def without_labels(trace: ExitTrace) -> ExitTrace:
    """The trace as `collect_trace(labelled=False)` makes it: the full model's answers stand in for labels."""
    return replace(trace, labels=trace.logits[:, -1].argmax(-1), labelled=False)


class _Split(NamedTuple):
    pool: Pool
    choosing: Tensor
    judging: Tensor
    seed: int


def _recipe(policy: Any, rule: tuple[Any, bool], seed: int) -> Recipe:
    return Recipe(
        policy=policy,
        target=rule[0],
        metric=Accuracy(),
        per_exit=rule[1],
        options={},
        keep_weak_exits=False,
        min_leavers=10,
        learning_share=LEARNING_SHARE,
        seed=seed,
        every=1,
    )


def _taught(name: str, split: _Split, weak: tuple[int, ...], known: dict[tuple[int, ...], ExitPolicy]) -> ExitPolicy:
    """What the policy of this name learns from the split's learning rows; the same for all rules, so learned once."""
    if weak not in known:
        first, _ = split_places(len(split.choosing), LEARNING_SHARE, split.seed)
        rows = split.pool.trace.select(split.choosing[first])
        known[weak] = make_policy(_recipe(name, (MaxDrop(0.0), False), split.seed), rows, weak)
    return known[weak]


def _chosen(name: str, rule: tuple[Any, bool], split: _Split, known: dict[tuple[int, ...], ExitPolicy]) -> ExitPolicy:
    """The policy with thresholds, as `calibrate` makes it from the choosing rows."""
    pool, places = split.pool, split.choosing
    policy: Any = name
    learned, others = split_places(len(places), LEARNING_SHARE, split.seed)
    if isinstance(rule[0], Certified):
        if learns(name):  # the rows that make the path are those that teach
            policy = _taught(name, split, pool.weak_exits(places[learned]), known)
        return certify_setting(_recipe(policy, rule, split.seed), rule[0], pool.trace.select(places))[0].policy
    if learns(name):
        policy, places = _taught(name, split, pool.weak_exits(places), known), places[others]
    return choose(_recipe(policy, rule, split.seed), pool, places).policy


def _gap(recipe: Recipe, pool: Pool, order: Tensor, num_choosing: int, folds: int | None = None) -> float | None:
    """What a choice was expected to be worth minus what it was to the judging rows; the mean of two splits.

    The judging rows of a finite pool are bad where those that choose are good, so every split starts from both ends of the
    order: halves of the pool take turns, and what the pool's parts differ in is no part of the gap.
    """
    gaps = []
    for places in (order, order.flip(0)):
        choosing, judging = places[:num_choosing], places[num_choosing:]
        expected = expect(recipe, Pool(pool.trace.select(choosing), Accuracy()), folds)
        if expected is None:
            return None
        drop, _, _ = _outcome(choose(recipe, pool, choosing).policy, pool)
        gaps.append(expected.difference + float(drop[judging].mean()))
    return sum(gaps) / len(gaps)


def fold_gaps(task: Task, splits: int) -> list[dict[str, Any]]:
    """What `expected` is off by with several numbers of folds, where weak exits are closed and where they are kept.

    Beside it how many exits are weak to the rows of the choice, and to those that a fold leaves.
    """
    pools, cells = [Pool(trace, Accuracy()) for trace in task.traces], []
    for keep, folds in product((False, True), (5, 10, task.num_choosing // LEAST_ROWS)):
        gaps, weak = [], []
        for seed in range(splits):
            pool = pools[seed % len(pools)]
            order = torch.randperm(pool.trace.num_rows, generator=torch.Generator().manual_seed(seed))
            recipe = replace(_recipe("confidence", RULES[EXPECTED], seed), keep_weak_exits=keep)
            gaps.append(_gap(recipe, pool, order, task.num_choosing, folds))
            counts = (task.num_choosing, task.num_choosing - task.num_choosing // folds)
            weak.append([0 if keep else len(pool.weak_exits(order[:count])) for count in counts])
        cells.append(
            {
                "trace": task.name,
                "keep_weak_exits": keep,
                "folds": folds,
                "splits": splits,
                "gap": float(np.mean(gaps)),
                "error": float(np.std(gaps) / np.sqrt(splits)),
                "weak": np.mean(weak, 0).tolist(),
            }
        )
    return cells


def _outcome(policy: ExitPolicy, pool: Pool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of quality, harm and layers of every row of the pool."""
    trace = pool.trace
    scores, answers = pool.scan(policy)
    taken = policy.decide(scores)
    early = answers[torch.arange(trace.num_rows), taken].argmax(-1) == trace.labels
    full = trace.logits[:, -1].argmax(-1) == trace.labels
    return full.double() - early.double(), (full & ~early).double(), torch.tensor(trace.exit_layers)[taken].double()


def judge(task: Task, policy: str, splits: int, rules: dict[str, tuple[Any, bool]]) -> dict[str, Any]:
    """What each rule promised and what rows got, over random splits that go round the task's traces.

    Certified settings are judged on the whole pool, all others on the rows that did not choose.
    """
    pools = [Pool(trace, Accuracy()) for trace in task.traces]
    losses: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
    gaps: list[float] = []
    refused = dict.fromkeys(rules, 0)
    for seed in range(splits):
        pool = pools[seed % len(pools)]
        order = torch.randperm(pool.trace.num_rows, generator=torch.Generator().manual_seed(seed))
        split = _Split(pool, order[: task.num_choosing], order[task.num_choosing :], seed)
        known: dict[tuple[int, ...], ExitPolicy] = {}
        for name, rule in rules.items():
            try:
                made = _chosen(policy, rule, split, known)
            except CalibrationError:
                refused[name] += 1  # nothing was promised
                continue
            drop, harm, layers = _outcome(made, pool)
            certified = isinstance(rule[0], Certified)
            where = slice(None) if certified else split.judging
            loss = harm if certified and rule[0].risk != "drop" else drop
            losses[name].append((float(loss[where].mean()), float(layers[where].mean())))
            if name == EXPECTED and policy == "confidence":
                gap = _gap(_recipe(policy, rule, seed), pool, order, task.num_choosing)
                gaps += [] if gap is None else [gap]
    return {
        name: _cell(task, rule[0], splits, refused[name], losses[name], gaps if name == EXPECTED else [])
        for name, rule in rules.items()
    }


def _cell(
    task: Task, target: Any, splits: int, refused: int, losses: list[tuple[float, float]], gaps: list[float]
) -> dict[str, Any]:
    drops, layers = np.array(losses).reshape(-1, 2).T
    depth = task.traces[0].exit_layers[-1]
    return {
        "rows": task.traces[0].num_rows,
        "choosing": task.num_choosing,
        "seeds": len(task.traces),
        "splits": splits,
        "refused": refused,
        "broken": int((drops > getattr(target, "drop", 0.0) + 1e-9).sum()),
        "drop": float(drops.mean()) if len(drops) else None,
        "spread": float(drops.std()) if len(drops) else None,
        "speed_up": float((depth / layers).mean()) if len(drops) else None,
        "expected_gap": float(np.mean(gaps)) if gaps else None,
        "expected_error": float(np.std(gaps) / np.sqrt(len(gaps))) if gaps else None,
    }
