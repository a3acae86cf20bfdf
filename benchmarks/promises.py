"""How often chosen settings keep their word: on random halves of real traces, and in simulations of known risk.

python benchmarks/promises.py                     # everything, then docs/results-promises.md
python benchmarks/promises.py --parts page        # the page from benchmarks/results/promises.json

Traces come from the data folder (SST-2, fine-tuned) and from benchmarks/traces (benchmarks/promises_traces.py).
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import promises_page
import promises_simulated as simulated
import torch
from safetensors.torch import load_file
from tasks import DATA

from hf_earlyexit import ExitTrace, FinalLayerError, MaxDrop, replay
from hf_earlyexit.calibration import Certified, calibrate
from hf_earlyexit.errors import CalibrationError

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "promises.json"
PARTS = ("sizes", "monitor", "validity", "traces", "page")
POLICIES = ("confidence", "beem-a", "beem-calibrated", "reward")
RULES: dict[str, tuple[Any, bool | None]] = {
    "MaxDrop(0)": (MaxDrop(0.0), None),
    "MaxDrop(0.01)": (MaxDrop(0.01), None),
    "MaxDrop(0, sigmas=1)": (MaxDrop(0.0, sigmas=1.0), None),
    "MaxDrop(0.01) per exit": (MaxDrop(0.01), True),
    "FinalLayerError()": (FinalLayerError(), None),
    "Certified(0.01, 0.9)": (Certified(0.01, 0.9), None),
    "Certified(0.01, 0.9, harm)": (Certified(0.01, 0.9, risk="harm"), None),
}
SHARE_CHOOSING = 0.5


def traces() -> dict[str, tuple[ExitTrace, int]]:
    """Pools of rows that trained nothing, and how many of each choose."""
    found = {}
    path = DATA / "traces" / "sst2_bge-small_mean-pooled.safetensors"
    if path.exists():
        tensors = load_file(path)
        logits, labels = (
            torch.cat([tensors[f"{part}_{what}"] for part in ("heldback", "dev")]) for what in ("logits", "labels")
        )
        trace = ExitTrace(logits=logits.float(), labels=labels.long(), exit_layers=tuple(range(1, 13)))
        found["sst2 (fine-tuned)"] = trace, 3000
    for path in sorted((ROOT / "traces").glob("*.safetensors")):
        trace = ExitTrace.load(path)
        found[path.stem] = trace, int(SHARE_CHOOSING * trace.num_rows)
    return found


def judge(trace: ExitTrace, num_choosing: int, policy: str, rule: str, splits: int) -> dict[str, Any]:
    """What one rule promised and what the rows that were left out got, over random splits."""
    target, per_exit = RULES[rule]
    certified = isinstance(target, Certified)
    drops, ups, gaps, spared = [], [], [], 0
    for seed in range(splits):
        order = torch.randperm(trace.num_rows, generator=torch.Generator().manual_seed(seed))
        chosen, rest = trace.select(order[:num_choosing]), trace.select(order[num_choosing:])
        expects = rule == "MaxDrop(0.01)"
        try:
            result = calibrate(
                chosen, policy, target, metric="accuracy", per_exit=per_exit, folds=5 if expects else 0, seed=seed
            )
        except CalibrationError:
            spared += 1  # nothing promised
            continue
        outcome = replay(result.policy, trace if certified else rest)
        drop = outcome.full_quality - outcome.quality
        if rule.endswith("harm)"):
            drop = _harm(result.policy, trace)
        drops.append(drop)
        ups.append(outcome.layer_speed_up)
        if expects and result.expected is not None:
            gaps.append(result.expected.difference - (outcome.quality - outcome.full_quality))
    limit = getattr(target, "drop", 0.0)
    return {
        "rows": trace.num_rows,
        "choosing": num_choosing,
        "splits": splits,
        "refused": spared,
        "broken": int((np.array(drops) > limit + 1e-9).sum()),
        "drop": float(np.mean(drops)) if drops else None,
        "spread": float(np.std(drops)) if drops else None,
        "speed_up": float(np.mean(ups)) if ups else None,
        "expected_gap": float(np.mean(gaps)) if gaps else None,
        "expected_spread": float(np.std(gaps)) if gaps else None,
    }


def _harm(policy: Any, trace: ExitTrace) -> float:
    scores, answers = policy.scan(trace)
    given = answers[torch.arange(trace.num_rows), policy.decide(scores)].argmax(-1)
    return float(((given != trace.labels) & (trace.logits[:, -1].argmax(-1) == trace.labels)).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--only", nargs="+", default=None, help="names of traces")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    def keep(part: str, value: Any) -> None:
        latest = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        latest[part] = value if not isinstance(value, dict) else latest.get(part, {}) | value
        RESULTS.write_text(json.dumps(latest, indent=1) + "\n")

    if "sizes" in args.parts:
        keep("sizes", simulated.sizes())
    if "monitor" in args.parts:
        keep("false_alarms", simulated.false_alarms(args.streams))
        keep("detection", simulated.detection(min(args.streams, 200)))
    if "validity" in args.parts:
        keep("validity", simulated.validity(args.draws))
    if "traces" in args.parts:
        for name, (trace, num_choosing) in traces().items():
            for policy in args.policies if args.only is None or name in args.only else ():
                for rule in RULES:
                    keep("traces", {f"{name}|{policy}|{rule}": judge(trace, num_choosing, policy, rule, args.splits)})
                    print(name, policy, rule, flush=True)
    if "page" in args.parts:
        promises_page.write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
