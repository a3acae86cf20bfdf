"""What the exported forms decide and what they cost, beside the torch model; results and the docs' figures.

    OMP_NUM_THREADS=1 python benchmarks/onnx_forms.py build/glue/sst2-0 --parts export hold batch-1 throughput
    OMP_NUM_THREADS=1 python benchmarks/onnx_forms.py --parts shape

Each run adds its parts to benchmarks/results/onnx.json and makes the last section of docs/how-to/onnx.md anew. Time is the
CPU time of one thread; ways are run in turns, in random order, and ratios are taken turn by turn.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx_page import write_page
from speed import all_exits, mixed_rows, spread_out
from speed_page import SHAPES
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.onnx.classifier import OnnxClassifier
from hf_earlyexit.onnx.export import one_file
from hf_earlyexit.onnx.layer_files import cut_pieces
from hf_earlyexit.onnx.walk import walk_graph
from hf_earlyexit.serving.batching import pad_batch
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.timing import seconds_in_turns

ROOT = Path(__file__).parent
RESULTS = ROOT / "results" / "onnx.json"
NEAR = 1e-5
POLICIES = ("confidence", "beem-a", "beem-calibrated")


def in_turns(ways: dict, repeats: int) -> dict[str, list[float]]:
    """CPU seconds of every way, after one turn to warm up."""
    seconds = seconds_in_turns({name: [way] for name, way in ways.items()}, repeats, clock=time.thread_time)
    return {name: times[:, 0].tolist() for name, times in seconds.items()}


def over(first: list[float], second: list[float]) -> dict[str, float]:
    """How many times as fast the second is: median and range of the turns."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def session_of(data) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def feeds(row: dict) -> dict[str, np.ndarray]:
    ids = np.array([row["input_ids"]])
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


class Trained:
    """A trained model, its rows, and its exports in build/."""

    def __init__(self, folder: Path) -> None:
        task = json.loads((folder / "train.json").read_text())["task"]
        self.folder, self.tokenizer, self.splits = folder, AutoTokenizer.from_pretrained(folder), load_rows(TASKS[task])
        self.model = ee.EarlyExitBertForSequenceClassification.from_pretrained(folder).eval()
        self.held = ee.ExitTrace.load(folder / "held-back.safetensors")
        self.report = encode_rows(self.splits["report"], self.tokenizer)
        self.exact, self.small = (folder.parent / f"{folder.name}-{name}" for name in ("onnx", "int8"))

    def rows(self, count: int) -> list[dict]:
        """Rows of the report split, and of the held-back one."""
        return (self.report + encode_rows(self.splits["held-back"], self.tokenizer))[:count]


def export_part(trained: Trained, drop: float) -> dict:
    """Both exports, and what 8 bits change: on the rows that chose the thresholds, and on the report rows."""
    model, seconds = trained.model, {}
    model.set_exit_policy(ee.calibrate(trained.held, "confidence", ee.MaxDrop(drop)))
    start = time.thread_time()
    ee.export_onnx(model, trained.exact)
    seconds["float32"], start = time.thread_time() - start, time.thread_time()
    changed = ee.export_onnx(model, trained.small, int8=True, rows=trained.splits["held-back"], tokenizer=trained.tokenizer)
    seconds["int8, with its calibration"] = time.thread_time() - start
    small = ee.OnnxClassifier.from_pretrained(trained.small, threads=1)
    labels, told = trained.splits["report"]["label"], {}
    for name, one, policy in (("before", model, model.exit_policy), ("unchanged", small, model.exit_policy),
                              ("after", small, changed.result.policy)):  # fmt: skip
        trace = ee.collect_trace(one, trained.report, labels=labels, max_batch_tokens=512, progress=False)
        done = ee.replay(policy, trace)
        told[name] = {"quality": done.quality, "full_quality": done.full_quality, "mean_layers": done.mean_layers}
    values = {key: value for key, value in changed.to_dict().items() if key != "result"}
    sizes = {path.name: (path / "model.onnx").stat().st_size for path in (trained.exact, trained.small)}
    return {"cpu_seconds": seconds, "bytes_of_one_file": sizes, "target": changed.result.target,
            "held_back": values, "report": {"rows": len(labels), **told}}  # fmt: skip


def hold_part(trained: Trained, count: int) -> dict:
    """Label and exit layer of the torch engine and both float32 forms, row by row."""
    rows, model = trained.rows(count), trained.model
    whole = walk_graph(model)
    onnx = OnnxClassifier(model.config, cut_pieces(whole, model.config).__getitem__, "", "float32", 1)
    found = {}
    for name in POLICIES:
        policy = ee.calibrate(trained.held, name, ee.LayerBudget(4.5)).policy
        model.set_exit_policy(policy)
        truth, layers = ee.predict(model, rows), ee.predict(onnx, rows)
        model.set_exit_policy(None)
        session = session_of(one_file(whole, model.config, policy))
        told = [session.run(["exit_layer", "logits"], feeds(row)) for row in rows]
        one = torch.tensor([int(layer[0]) for layer, _ in told])
        one_label = torch.tensor([int(logits.argmax()) for _, logits in told])
        index = torch.tensor([model.exit_layers.index(layer) for layer in truth.exit_layer.tolist()])
        limits = torch.tensor([*(np.inf if t is None else t for t in policy.thresholds), np.inf])
        near = (truth.exit_score - limits[index]).abs() < NEAR
        found[name] = {"rows": len(rows), "mean_layers": float(truth.exit_layer.double().mean()),
                       "rows_that_leave_near_a_threshold": int(near.sum())}  # fmt: skip
        for form, layer, label in (("layers", layers.exit_layer, layers.logits.argmax(-1)), ("one-file", one, one_label)):
            off = (layer != truth.exit_layer) | (label != truth.logits.argmax(-1))
            found[name][form] = {"differences": int(off.sum()), "of_these_near_a_threshold": int((off & near).sum())}
        print(name, found[name], flush=True)
    return found


def batch_1_part(trained: Trained, count: int, timed: int, repeats: int) -> dict:
    """One file against sessions layer by layer: exits on all rows, time on some of them."""
    rows, found = trained.rows(count), {}
    few = [feeds(row) for row in random.Random(0).sample(rows, timed)]
    for name, folder in (("float32", trained.exact), ("int8", trained.small)):
        start = time.thread_time()
        onnx = OnnxClassifier.from_pretrained(folder, threads=1)
        loaded, start = time.thread_time() - start, time.thread_time()
        session = session_of(folder / "model.onnx")
        opened = time.thread_time() - start
        layers = ee.predict(onnx, rows).exit_layer.tolist()
        told = [int(session.run(["exit_layer"], feeds(row))[0][0]) for row in rows]
        walker, threshold = onnx.walker, [np.inf if t is None else t for t in onnx.exit_policy.thresholds] + [-1]

        def bare(given, walker=walker, threshold=threshold) -> None:
            """Sessions in a plain loop, as a server in any language would write it."""
            tokens = given["attention_mask"].astype(bool)
            ids = {key: given[key] for key in ("input_ids", "token_type_ids")}
            (hidden,) = walker._begin.run(None, ids)
            for index, layer in enumerate(walker._layers):
                (hidden,) = layer.run(None, {f"hidden_{index}": hidden, "tokens": tokens})
                logits = walker._exits[index].run(None, {f"hidden_{index + 1}": hidden, "tokens": tokens})[0][0]
                chances = np.exp(logits - logits.max())
                if chances.max() / chances.sum() >= threshold[index]:
                    return

        def with_tensors(given, onnx=onnx) -> None:
            onnx(**{key: torch.from_numpy(value) for key, value in given.items()})

        ways = {"one file": lambda given, session=session: session.run(None, given),
                "a session a layer": bare, "OnnxClassifier": with_tensors}  # fmt: skip
        seconds = in_turns({key: lambda way=way: [way(given) for given in few] for key, way in ways.items()}, repeats)
        found[name] = {
            "rows": len(rows),
            "differences": sum(a != b for a, b in zip(layers, told, strict=True)),
            "mean_layers": statistics.mean(layers),
            "milliseconds_a_row": {key: 1000 * statistics.median(times) / timed for key, times in seconds.items()},
            "one_file_over_sessions": over(seconds["a session a layer"], seconds["one file"]),
            "timed_rows": timed,
            "cpu_seconds_to_load": {"layers": loaded, "one file": opened},
        }
        print(name, found[name], flush=True)
    return found


def throughput(model, ways: dict, rows: list[dict], repeats: int, batch_size: int = 32) -> dict:
    """Every way against the stock model in arrival order, padded to the longest."""

    @torch.inference_mode()
    def stock() -> None:
        for start in range(0, len(rows), batch_size):
            model.classify(model.base_model(**pad_batch(rows[start : start + batch_size])).last_hidden_state)

    seconds = in_turns({"stock": stock, **ways}, repeats)
    told = {name: {"rows_per_second": len(rows) / statistics.median(times), "speed_up": over(seconds["stock"], times)}
            for name, times in seconds.items()}  # fmt: skip
    for name, one in told.items():
        print(f"{name:40s} {one['rows_per_second']:8.1f} rows/s {one['speed_up']['median']:.2f}x", flush=True)
    return {"rows": len(rows), "mean_tokens": statistics.mean(len(row["input_ids"]) for row in rows),
            "batch_size": batch_size, "repeats": repeats, "ways": told}  # fmt: skip


def layered_ways(model, exact, small) -> dict:
    """Ways to run early-exit models, by name, as functions of the rows."""
    return {
        "torch, early exit": lambda rows: ee.predict(model, rows),
        "float32, early exit": lambda rows: ee.predict(exact, rows),
        "int8, all layers": lambda rows: ee.predict(small, rows, early_exit=False),
        "int8, early exit": lambda rows: ee.predict(small, rows),
    }


def throughput_part(trained: Trained, count: int, repeats: int) -> dict:
    """The trained model on report rows, thresholds for a mean of 6 layers."""
    rows = trained.report[:count]
    exact, small = (ee.OnnxClassifier.from_pretrained(folder, threads=1) for folder in (trained.exact, trained.small))
    held = trained.splits["held-back"].select(range(500))
    trace = ee.collect_trace(small, held, tokenizer=trained.tokenizer, max_batch_tokens=512, progress=False)
    trained.model.set_exit_policy(policy := spread_out(trained.held))
    exact.set_exit_policy(policy)
    small.set_exit_policy(spread_out(trace))
    ways = layered_ways(trained.model, exact, small)
    mean = {name: float(ee.predict(one, rows).exit_layer.double().mean())
            for name, one in (("float32", exact), ("int8", small))}  # fmt: skip
    found = throughput(trained.model, {name: lambda way=way: way(rows) for name, way in ways.items()}, rows, repeats)
    return {**found, "mean_layers": mean}


def shape_part(shape: str, count: int, repeats: int) -> dict:
    """Random weights, mixed lengths (log-normal, median 28 tokens), rows leaving after 6 of 12 layers in the mean."""
    torch.manual_seed(0)
    config = ee.EarlyExitBertConfig(num_hidden_layers=12, num_labels=2, exit_head="linear-cls", **SHAPES[shape])
    model = ee.EarlyExitBertForSequenceClassification(config).eval()
    rows, forms = mixed_rows(count), {}
    for name, folder in (("float32", RESULTS.parent / "shape"), ("int8", RESULTS.parent / "shape8")):
        ee.export_onnx(model, folder, forms=["layers"], int8=name == "int8")
        forms[name] = ee.OnnxClassifier.from_pretrained(folder, threads=1)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        forms[name].set_exit_policy(spread_out(all_exits(forms[name], rows)))
    model.set_exit_policy(forms["float32"].exit_policy)
    ways = {name: lambda way=way: way(rows) for name, way in layered_ways(model, *forms.values()).items()}
    mean = {name: float(ee.predict(one, rows).exit_layer.double().mean()) for name, one in forms.items()}
    return {**throughput(model, ways, rows, repeats), "mean_layers": mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="folder that train_exits.py left")
    parser.add_argument("--parts", nargs="+", default=[], choices=["export", "hold", "batch-1", "throughput", "shape"])
    parser.add_argument("--shape", choices=SHAPES, default="bert")
    parser.add_argument("--drop", type=float, default=0.0, help="accuracy that the exported policy may lose")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--timed", type=int, default=150, help="rows that are timed at batch 1")
    parser.add_argument("--many", type=int, default=320, help="rows for throughput")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--exports", type=Path, help="folder for the exported models; beside the model by default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    trained = Trained(args.model) if args.model else None
    if trained is not None and args.exports:
        trained.exact, trained.small = args.exports / trained.exact.name, args.exports / trained.small.name
    runs = {
        "export": lambda: export_part(trained, args.drop),
        "hold": lambda: hold_part(trained, args.rows),
        "batch-1": lambda: batch_1_part(trained, min(args.rows, 1000), args.timed, args.repeats),
        "throughput": lambda: throughput_part(trained, args.many, args.repeats),
        "shape": lambda: shape_part(args.shape, args.many, args.repeats),
    }
    for part in args.parts:
        results[f"shape {args.shape}" if part == "shape" else part] = runs[part]()
        versions = ", ".join(f"{name} {version(name)}" for name in ("onnxruntime", "torch", "transformers"))
        results["environment"] = f"{torch.backends.cpu.get_cpu_capability()}, 1 thread; {versions}."
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results)


if __name__ == "__main__":
    main()
