"""What must hold for a trained model on real rows: calibrated = served, counted layers, rows that never see each other.

    python benchmarks/hold.py build/glue/sst2-0 --rows 2000 --pairs 5000

checks every policy, prints the counts, writes benchmarks/results/hold.json and exits with 1 if anything is off.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tasks import TASKS, load_rows
from transformers import AutoTokenizer

import hf_earlyexit as ee
from hf_earlyexit.policies import POLICIES
from hf_earlyexit.serving.batching import pad_batch, sorted_batches
from hf_earlyexit.serving.cuda_graphs import SegmentGraphs
from hf_earlyexit.serving.graph_walker import GraphWalker
from hf_earlyexit.serving.rows import encode_rows
from hf_earlyexit.serving.scheduler import Scheduler
from hf_earlyexit.serving.tables import text_columns

NEAR = 1e-5


class LayerCount:
    """Rows that passed through all layers together, counted by hooks on the layers while the block runs."""

    def __init__(self, model) -> None:
        self.layers, self.rows = model.bert.encoder.layer, 0

    def __enter__(self) -> LayerCount:
        self.hooks = [layer.register_forward_hook(self.count) for layer in self.layers]
        return self

    def count(self, module, inputs, output) -> None:
        self.rows += output.shape[0]

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()


def served_as_calibrated(model, batches, policy) -> dict:
    """Exit layers of the engine against `scan` on the full pass of the same batches; layers counted by hooks."""
    differences, flips, counted, served = 0, 0, 0, []
    for batch, trace in batches:
        with LayerCount(model) as count:
            layers = model(**batch, early_exit=True).exit_layer
        served.append(layers)
        counted += count.rows
        scores = policy.scan(trace).scores
        wrong = layers != torch.tensor(model.exit_layers)[policy.decide(scores)]
        near = near_ties(policy, scores)
        differences += int((wrong & ~near).sum())
        flips += int((wrong & near).sum())
    rows = sum(len(layers) for layers in served)
    return {
        "rows": rows,
        "differences": differences,
        "differences_at_near_ties": flips,
        "mean_layers_reported": float(torch.cat(served).double().mean()),
        "mean_layers_counted_by_hooks": counted / rows,
        "layers_used": sorted(set(torch.cat(served).tolist())),
    }


def with_traces(model, encoded, size: int) -> list:
    """Batches of rows of similar length, each with its full pass."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]["input_ids"]))
    batches = [pad_batch([encoded[row] for row in order[start : start + size]]) for start in range(0, len(order), size)]
    return [(batch, full_trace(model, batch)) for batch in batches]


def full_trace(model, batch) -> ee.ExitTrace:
    logits = model(**batch, early_exit=False).exit_logits
    return ee.ExitTrace(logits=logits, labels=torch.zeros(len(logits), dtype=torch.long), exit_layers=model.exit_layers)


def near_ties(policy, scores: torch.Tensor) -> torch.Tensor:
    """Rows with any open exit whose score is within NEAR of its threshold, `[N]`."""
    thresholds = torch.tensor([torch.inf if t is None else t for t in policy.thresholds])
    return ((scores[:, :-1] - thresholds).abs() < NEAR).any(1)


def rows_apart(model, encoded, traces, policy, pairs: int, seed: int = 0) -> dict:
    """Each row alone against the same row in random batches."""
    alone = [model(**pad_batch([row]), early_exit=True) for row in encoded]
    labels = torch.stack([output.logits[0].argmax() for output in alone])
    layers = torch.cat([output.exit_layer for output in alone])
    near = torch.cat([near_ties(policy, policy.scan(trace).scores) for trace in traces])
    rng, changed, flips, seen = np.random.default_rng(seed), 0, 0, 0
    while seen < pairs:
        rows = rng.choice(len(encoded), int(rng.integers(2, 13)), replace=False)
        output = model(**pad_batch([encoded[row] for row in rows]), early_exit=True)
        off = (output.exit_layer != layers[rows]) | (output.logits.argmax(-1) != labels[rows])
        changed += int((off & ~near[rows]).sum())
        flips += int((off & near[rows]).sum())
        seen += len(rows)
    return {"pairs": seen, "changed": changed, "changed_at_near_ties": flips, "rows_near_a_threshold": int(near.sum())}


def repeated(body):
    """In the place of a CUDA graph: does the same again, on the same buffers, on any device."""
    outputs = [None if part is None else part.clone() for part in body()]

    def replay() -> None:
        for kept, part in zip(outputs, body(), strict=True):
            if kept is not None:
                kept.copy_(part)

    return replay, outputs


def on_every_path(model, tokenizer, texts, rows, policy) -> dict:
    """Label and exit layer of each row alone against forward in batches, the engine in every way, and the pipeline."""
    near = torch.empty(len(rows), dtype=torch.bool)
    for places, batch in sorted_batches(rows, 512):
        near[places] = near_ties(policy, policy.scan(full_trace(model, batch)).scores)
    alone = [model(**pad_batch([row]), early_exit=True) for row in rows]
    labels = torch.stack([output.logits[0].argmax() for output in alone])
    layers = torch.cat([output.exit_layer for output in alone])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    shuffled = [rows[place] for place in order.tolist()]

    def forward():
        outputs = [model(**pad_batch(rows[start : start + 32]), early_exit=True) for start in range(0, len(rows), 32)]
        return torch.cat([out.logits.argmax(-1) for out in outputs]), torch.cat([out.exit_layer for out in outputs])

    def engine(given, **options):
        answers = ee.predict(model, given, **options)
        return answers.logits.argmax(-1), answers.exit_layer

    def two_threads():
        torch.set_num_threads(2)
        try:
            return engine(rows)
        finally:
            torch.set_num_threads(1)

    def buckets():
        scheduler = Scheduler(GraphWalker(model, SegmentGraphs(repeated)), policy, 2048)
        scheduler.run(rows)  # what comes again is replayed
        answers = scheduler.run(rows)
        return answers.logits.argmax(-1), torch.tensor(model.exit_layers)[answers.exit_index]

    def pipeline():
        told = ee.pipeline(model=model, tokenizer=tokenizer)(texts, truncation=True)
        ids = [model.config.label2id[one["label"]] for one in told]
        return torch.tensor(ids), torch.tensor([one["exit_layer"] for one in told])

    back = order.argsort()
    paths = {
        "forward, batches of 32 in arrival order": forward,
        "engine, 64 tokens": lambda: engine(rows, max_batch_tokens=64),
        "engine, 4,096 tokens, another order": lambda: [part[back] for part in engine(shuffled, max_batch_tokens=4096)],
        "engine, two threads": two_threads,
        "engine in buckets and two lanes, as with CUDA graphs": buckets,
        "pipeline": pipeline,
    }
    found = {"rows": len(rows), "rows_near_a_threshold": int(near.sum()), "paths": {}}
    for name, path in paths.items():
        got_labels, got_layers = path()
        off = (got_labels != labels) | (got_layers != layers)
        found["paths"][name] = {"changed": int((off & ~near).sum()), "changed_at_near_ties": int((off & near).sum())}
        print(name, found["paths"][name], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--pool", type=int, default=200, help="rows that the pairs are drawn from")
    parser.add_argument("--paths-only", action="store_true", help="only compare forward, engine and pipeline")
    args = parser.parse_args()
    recipe = json.loads((args.model / "train.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(args.model).eval()
    held = ee.ExitTrace.load(args.model / "held-back.safetensors")
    splits = load_rows(TASKS[recipe["task"]])
    report = encode_rows(splits["report"], tokenizer)
    rows = (report + encode_rows(splits["held-back"], tokenizer))[: args.rows]
    out = Path(__file__).parent / "results" / "hold.json"
    out.parent.mkdir(exist_ok=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    column = text_columns(splits["report"].column_names)[0]
    texts = [*splits["report"][column], *splits["held-back"][column]][: args.rows]
    with torch.inference_mode():
        policy = ee.calibrate(held, "confidence", ee.LayerBudget(4.5)).policy
        model.set_exit_policy(policy)
        paths = on_every_path(model, tokenizer, texts, rows, policy)
        out.write_text(json.dumps({**kept, "paths": paths}, indent=1) + "\n")
        if any(path["changed"] for path in paths["paths"].values()):
            raise SystemExit(f"Paths differ: {paths}")
    if args.paths_only:
        return
    pool, results = report[: args.pool], {}
    with torch.inference_mode():
        batches = with_traces(model, rows, 32)
        traces = [full_trace(model, pad_batch([row])) for row in pool]
        for name in sorted(set(POLICIES.names()) - {"gate"}):  # the model has no gates
            options = {"weights": [1.0] * 12} if name == "beem" else {}
            policy = ee.calibrate(held, name, ee.LayerBudget(4.5), options=options).policy
            model.set_exit_policy(policy)
            apart = rows_apart(model, pool, traces, policy, args.pairs)
            results[name] = served_as_calibrated(model, batches, policy) | apart
            print(name, results[name], flush=True)
    out.write_text(json.dumps({"model": recipe, "near": NEAR, "policies": results, "paths": paths}, indent=1) + "\n")
    for name, found in results.items():
        counted = abs(found["mean_layers_reported"] - found["mean_layers_counted_by_hooks"])
        if found["differences"] or found["changed"] or counted > 1e-9:
            raise SystemExit(f"{name} does not hold: {found}")


if __name__ == "__main__":
    main()
