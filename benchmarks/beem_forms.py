"""Which part of BEEM costs what: its vote, its weights, its memory and its reset, on traces of trained models.

    python benchmarks/beem_forms.py build/glue/sst2-0

writes benchmarks/results/beem_forms.json; report.py puts it into the docs. Beside the run's own traces it reads two cached
ones of the same backbone, with heads on the mean of the tokens and on the first token's shared pooler.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from report import curve_on
from safetensors.torch import load_file
from tasks import DATA

import hf_earlyexit as ee

HALVES = 20
FORMS = {
    "confidence": ("confidence", {}),
    "patience": ("patience", {}),
    "BEEM-C, the paper's": ("beem-c", {}),
    "BEEM-A, the paper's": ("beem-a", {}),
    "BEEM-C, restart at 0 (released code)": ("beem-c", {"reset": "zero"}),
    "BEEM-C, vote = margin": ("beem-c", {"vote": "margin"}),
    "BEEM-C, vote = log-odds": ("beem-c", {"vote": "log-odds"}),
    "BEEM-A, vote = log-odds": ("beem-a", {"vote": "log-odds"}),
    "BEEM-A, half the score kept": ("beem-a", {"decay": 0.5}),
    "BEEM-A, nothing kept": ("beem-a", {"decay": 0.0}),
    "calibrated votes, no memory": ("beem-calibrated", {"memory": 0.0}),
    "calibrated votes, memory 0.25": ("beem-calibrated", {}),
    "calibrated votes, memory 0.75": ("beem-calibrated", {"memory": 0.75}),
}


def cached(heads: str) -> tuple[ee.ExitTrace, ee.ExitTrace]:
    tensors = load_file(DATA / "traces" / f"sst2_bge-small_{heads}.safetensors")
    parts = (("heldback", "held-back"), ("dev", "report"))
    return tuple(
        ee.ExitTrace(
            logits=tensors[f"{part}_logits"].float(),
            labels=tensors[f"{part}_labels"].long(),
            exit_layers=tuple(range(1, 13)),
            split=split,
        )
        for part, split in parts
    )


def pooled(held: ee.ExitTrace, report: ee.ExitTrace) -> ee.ExitTrace:
    return ee.ExitTrace(
        logits=torch.cat([held.logits, report.logits]),
        labels=torch.cat([held.labels, report.labels]),
        exit_layers=held.exit_layers,
    )


def compare(held: ee.ExitTrace, report: ee.ExitTrace) -> dict:
    """Per form: area on the report rows, and change and speed-up over random halves of all rows."""
    rows, forms = pooled(held, report), {}
    splits = [np.random.default_rng(seed).permutation(rows.num_rows) for seed in range(HALVES)]
    for name, (policy, options) in FORMS.items():
        built = ee.calibrate(held, policy, ee.MaxDrop(0.0), options=options)
        done = ee.replay(built.policy, report)
        halves = []
        for order in splits:
            half = rows.num_rows // 2
            chosen = ee.calibrate(rows.select(order[:half]), policy, ee.MaxDrop(0.0), options=options)
            judged = ee.replay(chosen.policy, rows.select(order[half:]))
            halves.append((judged.quality - judged.full_quality, judged.layer_speed_up))
        change, speed = np.array(halves).T
        forms[name] = {
            "area": float(curve_on(built.policy, report).mean()),
            "change": done.quality - done.full_quality,
            "layer_speed_up": done.layer_speed_up,
            "halves_change": float(change.mean()),
            "halves_change_error": float(change.std() / HALVES**0.5),
            "halves_speed_up": float(speed.mean()),
        }
        print(name, forms[name], flush=True)
    return {"rows_held_back": held.num_rows, "rows_reported": report.num_rows, "forms": forms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    args = parser.parse_args()
    traces = tuple(ee.ExitTrace.load(args.run / f"{part}.safetensors") for part in ("held-back", "report"))
    sources = {
        f"{args.run.name}: mean of the tokens, labels and distillation": traces,
        "cached: mean of the tokens, labels only, 16,000 rows": cached("mean-pooled"),
        "cached: shared pooler of the first token, labels only, 16,000 rows": cached("first-token"),
    }
    results = {"halves": HALVES, "sources": {name: compare(*traces) for name, traces in sources.items()}}
    out = Path(__file__).parent / "results" / "beem_forms.json"
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
