"""What fixed scales cost in quality beside scales of each token, on trained models; results and the docs' table.

    OMP_NUM_THREADS=1 python benchmarks/onnx_scales.py build/base-size/*-joint

For each folder that `base_size.py` left: an export in 8 bits by each way of rounding, with thresholds chosen anew on the
same held-back rows, and what it does on the report rows. Scales are found on training rows. Results go to
benchmarks/results/onnx.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from base_size import TASKS
from onnx_forms import RESULTS
from onnx_page import write_page
from tasks import load_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_earlyexit as ee

WAYS = {"each token": 0, "fixed by 256 rows": 256, "fixed by 1,024 rows": 1024}
SEED, DROP = 0, 0.01


def measured(folder: Path, held_back: int) -> dict:
    """Quality and layers on report rows: float32, and 8 bits by each way of rounding."""
    name = json.loads((folder / "train.json").read_text())["task"]
    splits, tokenizer = load_rows(TASKS[name]), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    trace = ee.ExitTrace.load(folder / "held-back.safetensors").select(torch.arange(held_back))
    model.set_exit_policy(ee.calibrate(trace, "confidence", ee.MaxDrop(DROP)))
    held = splits["held-back"].select(range(held_back))
    train = splits["train"].shuffle(seed=SEED)
    exact = ee.ExitTrace.load(folder / "report.safetensors")
    full = exact.logits[:, -1].argmax(-1)
    figures = {"float32": figures_of(exact, model.exit_policy, full)}
    for way, count in WAYS.items():
        scale_rows = train.select(range(count)) if count else None
        with TemporaryDirectory() as out:
            made = ee.export_onnx(
                model,
                out,
                forms=["layers"],
                int8=True,
                rows=held,
                scale_rows=scale_rows,
                tokenizer=tokenizer,
                target=f"max-drop:{DROP}",
            )
            small = ee.OnnxClassifier.from_pretrained(out, threads=1)
        report = ee.collect_trace(small, splits["report"], tokenizer=tokenizer, max_batch_tokens=384, progress=False)
        figures[way] = figures_of(report, made.result.policy, full)
        print(name, way, figures[way], flush=True)
    return {"held_back": held_back, "report": exact.num_rows, "drop": DROP, "ways": figures}


def figures_of(trace: ee.ExitTrace, policy: ee.policies.ExitPolicy, full: torch.Tensor) -> dict[str, float]:
    """What a policy does on a trace, and how often the last exit says what it says in float32."""
    done = ee.replay(policy, trace)
    agreed = float((trace.logits[:, -1].argmax(-1) == full).double().mean())
    return {"full": done.full_quality, "early": done.quality, "mean_layers": done.mean_layers, "agreement": agreed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--held-back", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        found = measured(folder, args.held_back)
        results = json.loads(RESULTS.read_text())
        results.setdefault("scales", {})[json.loads((folder / "train.json").read_text())["task"]] = found
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write_page(results)


if __name__ == "__main__":
    main()
