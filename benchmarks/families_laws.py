"""What every family keeps, in numbers, for the table of docs/families.md.

    OMP_NUM_THREADS=1 python -m benchmarks.families_laws          # a few minutes
    OMP_NUM_THREADS=1 python -m benchmarks.families_laws gpt2     # some of them

Tiny models with random weights and the thousand rows of tests/families: texts of all lengths, one token and the longest
input among them, or pictures. Writes benchmarks/results/families_laws.json; then run benchmarks.families_page.
"""

from __future__ import annotations

import json
import logging
import sys
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import torch

import hf_earlyexit as ee
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.walk import walk_graph
from tests.families.calibrated import NEAR, calibrated, clear, decided, opened, served
from tests.families.test_laws import states_of
from tests.families.tiny import PACKED, batch_of, rows_of, stock_class, stock_of
from tests.onnx.test_laws import one_by_one

from .families_page import LAWS

RULE = "confidence"


def measured(name: str) -> dict[str, Any]:
    """Differences and counts of one family."""
    family = calibrated(name)
    model, expected = family.model, family.expected[RULE]
    model.set_operating_points(family.policies, default=RULE)
    found = {"rows": len(family.rows), "served": same_exits(served(model, family.rows, RULE), expected)}
    return found | differences(name, model) | in_int8(model, family.rows) | in_onnx(model, family, expected)


def differences(name: str, model: Any) -> dict[str, Any]:
    """Largest differences of logits and states; 0.0 is to the bit."""
    stock, most = stock_of(model, name), []
    for padding in ("right", "left", "none"):
        batch = batch_of(name, rows=24, padding=padding)
        with torch.inference_mode():
            most.append(float((model(**batch, early_exit=False).logits - stock(**batch).logits).abs().max()))
    batch, keep = batch_of(name, rows=24, padding="none"), list(range(1, 24, 2))
    (whole, _), (kept, _) = states_of(model, batch), states_of(model, batch, keep=keep)
    batch = batch_of(name, rows=24)
    with torch.inference_mode():
        padded = model(**batch, early_exit=False).logits
    rows = rows_of(batch) if name in PACKED else []
    packed = ee.predict(model, rows, early_exit=False).logits if rows else None
    with TemporaryDirectory() as folder, torch.inference_mode():
        model.save_pretrained(folder)
        read = stock_class(name).from_pretrained(folder).eval()(**batch).logits
    return {
        "stock_answer": max(most),
        "stock_reads_folder": float((read - padded).abs().max()),
        "rows_dropped": float((whole[-1][keep] - kept[-1]).abs().max()),
        "packed": None if packed is None else float((packed - padded).abs().max()),
    }


def in_int8(model: Any, rows: list[Any]) -> dict[str, Any]:
    """Rows that an int8 copy serves where its own trace says."""
    small = ee.quantize_int8(model)
    trace = ee.collect_trace(small, rows, labelled=False, progress=False)
    policy = opened(RULE, trace)
    small.set_operating_points({RULE: policy})
    kept = clear({RULE: policy}, trace)
    expected = decided(policy, trace.select(kept))
    clear_rows = [rows[place] for place in kept.tolist()]
    return {"int8": same_exits(served(small, clear_rows, RULE), expected), "int8_rows": len(kept)}


def in_onnx(model: Any, family: Any, expected: Any) -> dict[str, Any]:
    """Rows that both exported forms serve where the model's trace says."""
    if model.family.untraced:
        return {"onnx_layers": None, "onnx_one_file": None}
    with TemporaryDirectory() as folder:
        ee.export_onnx(model, folder)
        layers = served(ee.OnnxClassifier.from_pretrained(folder, threads=1), family.rows, RULE)
    whole = one_file(walk_graph(model), model.config, family.policies[RULE])
    return {
        "onnx_layers": same_exits(layers, expected),
        "onnx_one_file": same_exits(one_by_one(whole, family.rows), expected),
    }


def same_exits(found: Any, expected: Any) -> int:
    """How many rows leave at the same layer with the same label."""
    same = (found[0] == expected[0]) & (found[1].argmax(-1) == expected[1].argmax(-1))
    return int(same.sum())


def main() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    found = json.loads(LAWS.read_text()) if LAWS.exists() else {"families": {}}
    for name in sys.argv[1:] or FAMILIES:
        found["families"][name] = measured(name)
        found |= {"near": NEAR, "versions": {one: version(one) for one in ("torch", "transformers", "onnxruntime")}}
        found["families"] = {one: found["families"][one] for one in FAMILIES if one in found["families"]}
        LAWS.write_text(json.dumps(found, indent=1) + "\n")
        print(name, found["families"][name], flush=True)


if __name__ == "__main__":
    main()
