"""The contestants of `load.py`, each an application of its own, and what they serve."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from onnx import TensorProto
from pydantic import BaseModel
from speed import spread_out
from tasks import BACKBONE, DATA, TASKS, load_rows
from transformers import AutoTokenizer, BertForSequenceClassification, pipeline

import hf_earlyexit as ee
from hf_earlyexit.measuring.bench import environment
from hf_earlyexit.measuring.onnx_forms import _in_8_bits, by_length
from hf_earlyexit.onnx.classifier import open_session
from hf_earlyexit.onnx.graphs import cut, inputs_of
from hf_earlyexit.onnx.walk import logits_of, walk_graph
from hf_earlyexit.server.app import make_app
from hf_earlyexit.server.rows import Limits
from hf_earlyexit.serving.batching import sorted_batches
from hf_earlyexit.serving.rows import encode_rows

__all__ = ["compare", "environment", "prepare"]
MOST, WAIT, QUEUE = 32, 0.005, 512  # of a dynamic batch: rows and seconds; rows that may wait


def prepare(work: Path, folder: Path | None) -> list[str]:
    """Write what the servers load; gives the texts that are asked."""
    splits = load_rows(TASKS["sst2"])
    texts = list(splits["report"]["sentence" if "sentence" in splits["report"].column_names else "text"])
    torch.manual_seed(0)
    source = folder or DATA / BACKBONE
    tokenizer = AutoTokenizer.from_pretrained(source)
    cls = ee.EarlyExitBertForSequenceClassification
    if folder is None:
        model = cls.from_pretrained(source, num_labels=2, dtype=torch.float32, exit_head="linear").eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "head" in name or "classifier" in name:
                    weight.normal_(0, 0.02 if weight.ndim == 1 else 0.3)
    else:
        model = cls.from_pretrained(folder).eval()
    rows = encode_rows(texts[:300], tokenizer)
    if model.exit_policy is None:
        model.set_exit_policy(spread_out(trace_of(model, rows)))
    ee.save(model, work / "model", tokenizer=tokenizer)
    ee.export_onnx(model, work / "small", forms=["layers"], int8=True, tokenizer=tokenizer)
    small = ee.OnnxClassifier.from_pretrained(work / "small", threads=1)
    policy = spread_out(ee.collect_trace(small, texts[:300], labels=[0] * 300, tokenizer=tokenizer, progress=False))
    (work / "policy.json").write_text(json.dumps(policy.to_dict()))
    whole = walk_graph(model)
    last = {logits_of(len(model.exit_layers) - 1): (TensorProto.FLOAT, ("batch", "classes"))}
    (work / "full.onnx").write_bytes(_in_8_bits(cut(whole, inputs_of(whole), last)))
    return texts


def trace_of(model: Any, rows: Any) -> ee.ExitTrace:
    """All exits of rows without labels."""
    logits = torch.empty(len(rows), len(model.exit_layers), model.num_labels)
    with torch.inference_mode():
        for places, batch in sorted_batches(rows, 512):
            logits[places] = model(**batch, early_exit=False).exit_logits
    return ee.ExitTrace(logits=logits, labels=torch.zeros(len(rows), dtype=torch.long), exit_layers=model.exit_layers)


class Body(BaseModel):
    inputs: list[str]


def pipeline_app(work: Path) -> FastAPI:
    """What is written first: a stock pipeline in a route."""
    app, lock = FastAPI(), threading.Lock()
    stock = BertForSequenceClassification.from_pretrained(work / "model").eval()
    classify = pipeline("text-classification", model=stock, tokenizer=AutoTokenizer.from_pretrained(work / "model"))

    @app.post("/v1/classify")
    def answer(body: Body) -> Any:
        with lock:
            return classify(body.inputs)

    return app


def batcher_app(answer_all: Callable[[list[str]], list[Any]]) -> FastAPI:
    """A dynamic batcher, as `@serve.batch` of Ray Serve: whoever waits goes together, at most so many and so long."""
    waiting: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()
    thread = ThreadPoolExecutor(1)
    tasks: set[Any] = set()

    async def run() -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await waiting.get()]
            ends_at = loop.time() + WAIT
            while len(batch) < MOST and (left := ends_at - loop.time()) > 0:
                try:
                    batch.append(
                        waiting.get_nowait() if not waiting.empty() else await asyncio.wait_for(waiting.get(), left)
                    )
                except TimeoutError:
                    break
            answers = await loop.run_in_executor(thread, answer_all, [text for text, _ in batch])
            for (_, future), one in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(one)

    app = FastAPI()

    @app.post("/v1/classify")
    async def answer(body: Body) -> Any:
        if not tasks:
            tasks.add(asyncio.create_task(run()))
        if waiting.qsize() >= QUEUE:
            raise HTTPException(429)
        futures = [asyncio.get_running_loop().create_future() for _ in body.inputs]
        for text, future in zip(body.inputs, futures, strict=True):
            waiting.put_nowait((text, future))
        return [{"label": str(label)} for label in await asyncio.gather(*futures)]

    return app


def torch_batches(work: Path) -> Callable[[list[str]], list[int]]:
    """The full stock model on a padded batch."""
    stock = BertForSequenceClassification.from_pretrained(work / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")

    def run(texts: list[str]) -> list[int]:
        with torch.inference_mode():
            batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
            return stock(**batch).logits.argmax(-1).tolist()

    return run


def onnx_batches(work: Path) -> Callable[[list[str]], list[int]]:
    """The full model in 8 bits, as ONNX Runtime's own tool makes it, on a padded batch."""
    session = open_session(lambda _: (work / "full.onnx").read_bytes(), "full.onnx", 1)
    tokenizer, answer = AutoTokenizer.from_pretrained(work / "model"), by_length(session, MOST)

    def run(texts: list[str]) -> list[int]:
        encoded = tokenizer(texts, truncation=True)
        rows = [{"input_ids": ids} for ids in encoded["input_ids"]]
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
        labels = [0] * len(rows)
        for place, label in zip(order, answer(rows)[0].argmax(-1).tolist(), strict=True):
            labels[place] = label
        return labels

    return run


def engine_app(work: Path, small: bool) -> FastAPI:
    """The engine, as `hf-earlyexit serve` puts it behind HTTP."""
    if small:
        model: Any = ee.OnnxClassifier.from_pretrained(work / "small", threads=1)
        model.set_exit_policy(ee.policies.ExitPolicy.from_dict(json.loads((work / "policy.json").read_text())))
    else:
        model = ee.EarlyExitBertForSequenceClassification.from_pretrained(work / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    engine = ee.Engine(model, tokenizer=tokenizer, max_queue=QUEUE)
    return make_app(engine, parts={"tokenizer": tokenizer}, limits=Limits())


APPS: dict[str, Callable[[Path], FastAPI]] = {
    "pipeline": pipeline_app,
    "batcher": lambda work: batcher_app(torch_batches(work)),
    "engine": lambda work: engine_app(work, small=False),
    "onnx-batcher": lambda work: batcher_app(onnx_batches(work)),
    "onnx-engine": lambda work: engine_app(work, small=True),
}


def compare(work: Path, count: int) -> dict[str, int]:
    """Rows that the engine and `predict` answer differently, arriving in random order from several threads.

    A row whose score is within 1e-5 of a threshold it was held against may fall on either side, whatever batch it is in.
    """
    splits = load_rows(TASKS["sst2"])
    column = "sentence" if "sentence" in splits["train"].column_names else "text"
    texts = list(splits["train"].select(range(min(count, len(splits["train"]))))[column])
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(work / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    expected = ee.predict(model, texts, tokenizer=tokenizer)
    order = list(range(len(texts)))
    random.Random(0).shuffle(order)
    with ee.Engine(model, tokenizer=tokenizer, max_queue=len(texts)) as engine, ThreadPoolExecutor(4) as pool:
        futures = dict(zip(order, pool.map(lambda place: engine.submit(texts[place]), order), strict=True))
        answers = {place: future.result() for place, future in futures.items()}
        batches = engine.state.batches
    thresholds = torch.tensor([one for one in model.exit_policy.thresholds if one is not None])
    layers = labels = near = 0
    for place, answer in answers.items():
        other = answer.exit_layer != int(expected.exit_layer[place])
        score = torch.tensor([answer.exit_score, float(expected.exit_score[place])])
        close = bool((score[:, None] - thresholds).abs().min() < 1e-5)
        near += other and close
        layers += other and not close
        labels += not other and int(answer.logits.argmax()) != int(expected.logits[place].argmax())
    return {"rows": len(texts), "other_layer": layers, "within_1e-5_of_a_threshold": near, "other_label": labels,
            "batches": batches}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(APPS))
    parser.add_argument("--work", type=Path)
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    uvicorn.run(APPS[args.name](args.work), host="127.0.0.1", port=args.port, access_log=False, log_level="warning")
