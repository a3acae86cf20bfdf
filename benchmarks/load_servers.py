"""The contestants of `load.py`, each an application of its own, and what they serve."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from load_page import CONTESTANTS, FLOAT, INT8
from load_rivals import MOST, QUEUE, STOCK, WAIT, serve_litserve, serve_ray
from onnx import TensorProto
from onnx.helper import make_node
from pydantic import BaseModel
from speed import all_exits, spread_out
from tasks import BACKBONE, DATA, TASKS, load_rows
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

import hf_earlyexit as ee
from hf_earlyexit.measuring.bench import environment
from hf_earlyexit.measuring.onnx_forms import _in_8_bits, by_length
from hf_earlyexit.onnx.classifier import open_session
from hf_earlyexit.onnx.export import one_file, open_one_row
from hf_earlyexit.onnx.fixed_scales import batches_of, find_roundings
from hf_earlyexit.onnx.graphs import inputs_of, subgraph
from hf_earlyexit.onnx.one_row import OneRow
from hf_earlyexit.onnx.walk import logits_of, walk_graph
from hf_earlyexit.server.app import make_app
from hf_earlyexit.serving.reader import reader_for
from hf_earlyexit.serving.rows import encode_rows

__all__ = ["compare", "environment", "prepare"]
MODEL, POLICY = "model", "policy.json"  # of the work folder; ONNX files are in folders "onnx" and "int8"
ONE_ROW = "int8-one-row.onnx"  # an export holds one with its own thresholds; those here are for a chosen mean layer
SCALE_ROWS = 1000
FORMS = {FLOAT: "onnx", INT8: "int8"}


def prepare(work: Path, folder: Path | None, exports: bool) -> tuple[list[str], dict[str, float]]:
    """Write what the servers load; gives the texts that are asked, and the layer they leave after by precision."""
    splits = load_rows(TASKS["sst2"])
    texts = list(splits["report"]["sentence"])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = folder or DATA / BACKBONE
    tokenizer = AutoTokenizer.from_pretrained(source)
    cls = ee.EarlyExitBertForSequenceClassification
    options = {} if folder else {"num_labels": 2, "dtype": torch.float32, "exit_head": "linear-cls"}
    model = cls.from_pretrained(source, **options).eval()
    if folder is None:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "head" in name or "classifier" in name:
                    weight.normal_(0, 0.3 if weight.ndim == 2 else 0.02)  # scores that lie apart
    rows = encode_rows(texts[:300], tokenizer)
    if model.exit_policy is None:
        model.set_exit_policy(spread_out(all_exits(model, rows)))
    ee.save(model, work / MODEL, tokenizer=tokenizer)
    models: dict[str, Any] = {FLOAT: model}
    if exports:
        whole, last = walk_graph(model), logits_of(len(model.exit_layers) - 1)
        plain = subgraph(whole, inputs_of(whole), {last: (TensorProto.FLOAT, ("batch", "classes"))})
        plain.graph.node.append(make_node("Identity", [last], ["logits"]))  # as others call it
        plain.graph.output[0].name = "logits"
        scale_rows = splits["train"].shuffle(seed=0).select(range(SCALE_ROWS))["sentence"]
        for precision, name in FORMS.items():
            small = precision == INT8
            scales = scale_rows if small else None
            ee.export_onnx(model, work / name, forms=["layers"], int8=small, scale_rows=scales, tokenizer=tokenizer)
            (work / f"{name}.onnx").write_bytes(_in_8_bits(plain) if small else plain.SerializeToString())
        write_stock(work, tokenizer)
        models[INT8] = ee.OnnxClassifier.from_pretrained(work / FORMS[INT8], threads=1)
        policy = spread_out(all_exits(models[INT8], rows))
        models[INT8].set_exit_policy(policy)
        (work / POLICY).write_text(json.dumps(policy.to_dict()))
        roundings = find_roundings(whole, batches_of(model, scale_rows, reader_for(model, tokenizer), None))
        (work / ONE_ROW).write_bytes(one_file(whole, model.config, policy, int8=True, roundings=roundings))
    layers = {name: ee.predict(one, texts, tokenizer=tokenizer).exit_layer for name, one in models.items()}
    return texts, {name: float(values.double().mean()) for name, values in layers.items()}


def write_stock(work: Path, tokenizer: Any) -> None:
    """The full model as an older transformers loads it, and as ONNX in 8 bits."""
    model = stock(work)
    model.config.id2label = {label: str(label) for label in range(model.config.num_labels)}
    model.config.label2id = {name: label for label, name in model.config.id2label.items()}
    del model.config.auto_map  # to classes of this library
    model.save_pretrained(work / STOCK)
    tokenizer.save_pretrained(work / STOCK)
    shutil.copy(work / f"{FORMS[INT8]}.onnx", work / STOCK / "model_quantized.onnx")


class Body(BaseModel):
    inputs: list[str]


def pipeline_app(work: Path) -> FastAPI:
    """What is written first: a stock pipeline in a route."""
    app, lock = FastAPI(), threading.Lock()
    classify = pipeline("text-classification", model=stock(work), tokenizer=AutoTokenizer.from_pretrained(work / MODEL))

    @app.post("/v1/classify")
    def answer(body: Body) -> Any:
        with lock:
            return classify(body.inputs)

    return app


def stock(work: Path) -> Any:
    """The full model as transformers has it."""
    return BertForSequenceClassification.from_pretrained(work / MODEL).eval()


def batcher_app(answer_all: Callable[[list[str]], list[int]]) -> FastAPI:
    """A dynamic batcher: whoever waits goes together, at most so many, and the first waits at most so long."""
    waiting: asyncio.Queue[tuple[str, asyncio.Future[int], float]] = asyncio.Queue()
    thread, tasks = ThreadPoolExecutor(1), []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            ends_at = batch[0][2] + WAIT
            while len(batch) < MOST:
                if not waiting.empty():
                    batch.append(waiting.get_nowait())
                elif (left := ends_at - loop.time()) > 0:
                    try:
                        batch.append(await asyncio.wait_for(waiting.get(), left))
                    except TimeoutError:
                        break
                else:
                    break
            labels = await loop.run_in_executor(thread, answer_all, [text for text, *_ in batch])
            for (_, future, _), label in zip(batch, labels, strict=True):
                if not future.done():
                    future.set_result(label)

    app = FastAPI()

    @app.post("/v1/classify")
    async def answer(body: Body) -> Any:
        loop = asyncio.get_running_loop()
        if not tasks:
            tasks.append(loop.create_task(run()))
        if waiting.qsize() >= QUEUE:
            raise HTTPException(429)
        futures = [loop.create_future() for _ in body.inputs]
        for text, future in zip(body.inputs, futures, strict=True):
            waiting.put_nowait((text, future, loop.time()))
        return [{"label": str(label)} for label in await asyncio.gather(*futures)]

    return app


def torch_batches(work: Path) -> Callable[[list[str]], list[int]]:
    """The full stock model on a padded batch."""
    model, tokenizer = stock(work), AutoTokenizer.from_pretrained(work / MODEL)

    def run(texts: list[str]) -> list[int]:
        with torch.inference_mode():
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            return model(**batch).logits.argmax(-1).tolist()

    return run


def onnx_batches(work: Path, name: str) -> Callable[[list[str]], list[int]]:
    """The full model as ONNX Runtime's own tools make it, on a padded batch."""
    session = open_session(lambda _: (work / f"{name}.onnx").read_bytes(), f"{name}.onnx", 1)
    tokenizer, answer = AutoTokenizer.from_pretrained(work / MODEL), by_length(session, MOST)

    def run(texts: list[str]) -> list[int]:
        rows = [{"input_ids": ids} for ids in tokenizer(texts, truncation=True)["input_ids"]]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))  # as `by_length` answers
        labels = [0] * len(rows)
        for place, label in zip(order, answer(rows)[0].argmax(-1).tolist(), strict=True):
            labels[place] = label
        return labels

    return run


def engine_app(work: Path, form: str, full: bool) -> FastAPI:
    """The engine, as `hf-earlyexit serve` puts it behind HTTP; with ONNX Runtime as for `--performance_hint latency`."""
    in_torch: Any = ee.EarlyExitBertForSequenceClassification.from_pretrained(work / MODEL).eval()
    model = in_torch if form == "torch" else ee.OnnxClassifier.from_pretrained(work / form, threads=1)
    if form == FORMS[INT8]:
        policy = json.loads((work / POLICY).read_text())
        model.set_exit_policy(ee.policies.ExitPolicy.from_dict(policy))
        model.walker.one_row = OneRow(lambda: open_session(lambda name: (work / name).read_bytes(), ONE_ROW, 1), policy)
    if full:
        model.set_exit_policy(None)
    elif form == FORMS[FLOAT]:
        model.walker.one_row = open_one_row(in_torch, model)
    tokenizer = AutoTokenizer.from_pretrained(work / MODEL)
    return make_app(ee.Engine(model, tokenizer=tokenizer, max_queue=QUEUE), parts={"tokenizer": tokenizer})


def serve(name: str, work: Path, port: int) -> None:
    """One of `CONTESTANTS`, until it is told to stop."""
    form, _, kind = name.partition("-")
    load = partial(torch_batches, work) if form == "torch" else partial(onnx_batches, work, form)
    if kind == "ray":
        return serve_ray(load, port)
    if kind == "litserve":
        return serve_litserve(load, port)
    if kind == "":
        app = pipeline_app(work)
    else:
        app = batcher_app(load()) if kind == "batcher" else engine_app(work, form, full=kind == "engine-full")
    return uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


def compare(work: Path, count: int) -> dict[str, int]:
    """Rows that the engine and `predict` answer differently, arriving in random order from several threads.

    A row whose score is within 1e-5 of the threshold it left by may fall on either side, as float32 adds up differently in
    batches of another shape.
    """
    texts = list(load_rows(TASKS["sst2"])["train"].select(range(count))["sentence"])
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(work / MODEL).eval()
    tokenizer = AutoTokenizer.from_pretrained(work / MODEL)
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    order = random.Random(0).sample(range(count), count)
    with ee.Engine(model, tokenizer=tokenizer, max_queue=count) as engine, ThreadPoolExecutor(4) as pool:
        futures = dict(zip(order, pool.map(lambda place: engine.submit(texts[place]), order), strict=True))
        answers = {place: future.result() for place, future in futures.items()}
        batches = engine.state.batches
    thresholds = dict(zip(model.exit_layers, model.exit_policy.thresholds, strict=False))
    counts = {"rows": count, "other_layer": 0, "at_threshold": 0, "other_label": 0, "batches": batches}
    for place, answer in answers.items():
        layer, score = min(  # of the two, the one who left first says by what
            (answer.exit_layer, answer.exit_score),
            (int(expected.exit_layer[place]), float(expected.exit_score[place])),
        )
        if answer.exit_layer != int(expected.exit_layer[place]):
            counts["at_threshold" if abs(score - thresholds[layer]) < 1e-5 else "other_layer"] += 1
        else:
            counts["other_label"] += int(answer.logits.argmax()) != int(expected.logits[place].argmax())
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    serve(args.name, args.work, args.port)
