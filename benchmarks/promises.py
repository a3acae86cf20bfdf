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
import warnings
from pathlib import Path
from typing import Any

import promises_page
import promises_shadow as shadow
import promises_simulated as simulated
import promises_sizes as size
import promises_splits as splits

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "promises.json"
PARTS = ("sizes", "monitor", "shift", "shadow", "validity", "traces", "unlabelled", "page")
UNLABELLED = ("sst2 fine-tuned", "sst2", "clinc150")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--policies", nargs="+", default=splits.POLICIES)
    parser.add_argument("--only", nargs="+", default=None, help="names of traces")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("hf_earlyexit").setLevel(logging.ERROR)  # thousands of alarms are the point of some parts

    def keep(part: str, value: Any) -> None:
        latest = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        latest[part] = value if not isinstance(value, dict) else latest.get(part, {}) | value
        RESULTS.write_text(json.dumps(latest, indent=1) + "\n")

    command = "python benchmarks/promises.py " + shlex.join(sys.argv[1:])
    made = json.loads(RESULTS.read_text()).get("commands", []) if RESULTS.exists() else []
    keep("commands", [*(one for one in made if one != command), command] if args.parts != ["page"] else made)
    for name, cell in size.sizes() if "sizes" in args.parts else ():
        keep("sizes", {name: cell})
    if "monitor" in args.parts:
        keep("false_alarms", simulated.false_alarms(args.streams))
        keep("detection", simulated.detection(args.streams))
    if "shift" in args.parts:
        keep("shift", simulated.shifts(min(args.streams, 200)))
    if "shadow" in args.parts:
        keep("shadow", shadow.cost())
    if "validity" in args.parts:
        keep("validity", simulated.validity(args.draws))
    for task in splits.tasks() if {"traces", "unlabelled"} & set(args.parts) else ():
        if args.only is not None and task.name not in args.only:
            continue
        for policy in args.policies if "traces" in args.parts else ():
            cells = splits.judge(task, policy, args.splits)
            keep("traces", {f"{task.name}|{policy}|{rule}": cell for rule, cell in cells.items()})
            print(task.name, policy, flush=True)
        if "unlabelled" in args.parts and task.name in UNLABELLED:
            bare = task._replace(traces=[splits.without_labels(trace) for trace in task.traces])
            cells = splits.judge(bare, "confidence", args.splits, splits.UNLABELLED)
            keep("unlabelled", {f"{task.name}|confidence|{rule}": cell for rule, cell in cells.items()})
    if "page" in args.parts:
        promises_page.write(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
