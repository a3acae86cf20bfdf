"""How often chosen settings keep their word: on random halves of real traces, and in simulations of known risk.

python benchmarks/promises.py                     # everything, then docs/results-promises.md and its plot
python benchmarks/promises.py --parts page        # the page from benchmarks/results/promises.json

Traces come from the data folder (SST-2, fine-tuned) and from benchmarks/traces (benchmarks/promises_traces.py).
"""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import promises_page
import promises_shadow as shadow
import promises_simulated as simulated
import promises_sizes as size
import promises_splits as splits
from filelock import FileLock

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "promises.json"
LOCK = Path(tempfile.gettempdir()) / "promises.lock"
PARTS = ("sizes", "monitor", "shift", "shadow", "validity", "traces", "folds", "unlabelled", "page")
OF_FOLDS = "rte"  # where `expected` was furthest off
UNLABELLED = ("sst2 fine-tuned", "sst2", "clinc150")


def keep(part: str, value: Any, command: str) -> None:
    """Write what was measured beside what there is, and the command; several runs at once may do so."""
    with FileLock(LOCK):
        latest = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        made = latest.setdefault("commands", {})  # by part, or by part and cell
        if isinstance(value, dict):
            latest[part] = latest.get(part, {}) | value
            made.update({f"{part}|{name}": command for name in value})
        else:
            latest[part] = value
            made[part] = command
        written = RESULTS.with_suffix(".part")
        written.write_text(json.dumps(latest, indent=1) + "\n")
        written.replace(RESULTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--policies", nargs="+", default=splits.POLICIES)
    parser.add_argument("--targets", nargs="+", choices=splits.RULES, default=list(splits.RULES), help="of the real traces")
    parser.add_argument("--only", nargs="+", default=None, help="names of traces")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("hf_earlyexit").setLevel(logging.ERROR)  # thousands of alarms are the point of some parts

    command = "python benchmarks/promises.py " + shlex.join(sys.argv[1:])
    wanted = {"traces", "folds", "unlabelled"} & set(args.parts)
    tasks = [task for task in splits.tasks() if args.only is None or task.name in args.only] if wanted else []
    for name, cell in size.sizes() if "sizes" in args.parts else ():
        keep("sizes", {name: cell}, command)
    if "monitor" in args.parts:
        keep("false_alarms", simulated.false_alarms(args.streams), command)
        keep("detection", simulated.detection(args.streams), command)
    if "shift" in args.parts:
        keep("shift", simulated.shifts(min(args.streams, 200)), command)
    if "shadow" in args.parts:
        keep("shadow", shadow.cost(), command)
    if "validity" in args.parts:
        keep("validity", simulated.validity(args.draws), command)
    if "folds" in args.parts:
        for task in tasks:
            if task.name == OF_FOLDS:
                keep("folds", splits.fold_gaps(task, args.splits), command)
    if "unlabelled" in args.parts:
        for task in tasks:
            if task.name in UNLABELLED:
                bare = task._replace(traces=[splits.without_labels(trace) for trace in task.traces])
                cells = splits.judge(bare, "confidence", args.splits, splits.UNLABELLED)
                keep("unlabelled", {f"{task.name}|confidence|{rule}": cell for rule, cell in cells.items()}, command)
    if "traces" in args.parts:
        for policy, task in product(args.policies, tasks):  # a policy's column is done before the next begins
            if splits.has_signals(task, policy):
                cells = splits.judge(task, policy, args.splits, {name: splits.RULES[name] for name in args.targets})
                keep("traces", {f"{task.name}|{policy}|{rule}": cell for rule, cell in cells.items()}, command)
                print(policy, task.name, flush=True)
    if "page" in args.parts:
        promises_page.write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
