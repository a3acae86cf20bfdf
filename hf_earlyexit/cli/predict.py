"""Classify the lines of a file, or the texts of a data set, as JSON lines with the layer each left after.

    hf-earlyexit predict --model bert-with-exits --input texts.txt --output answers.jsonl

Each line of the output is one JSON object; exit_layer tells where the text left.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..data.forms import Reading
from ..modeling.certificate import warn_of_other_tokenizer
from ..onnx.manifest import MANIFEST
from ..problem_types import SINGLE_LABEL
from ..serving.predict import predict
from ..serving.rows import text_columns
from ..training.data import load_splits, require_split
from .answer import Answer
from .loading import load_model


@dataclass
class PredictArguments:
    """Which model on which texts."""

    model: str = field(metadata={"help": "folder or Hub id of a model with exits, or a folder of ONNX files"})
    input: str = field(metadata={"help": "text file with one text a line, '-' for standard input, or a data set"})
    split: str = field(default="test", metadata={"help": "split of the data set"})
    output: str = field(default="-", metadata={"help": "file to write; '-' for standard output"})
    early_exit: bool | None = field(default=None, metadata={"help": "false runs the full model"})
    operating_point: str | None = field(default=None, metadata={"help": "name of the policy to use; exact: the full model"})
    max_batch_tokens: int | None = field(default=None, metadata={"help": "padded tokens in a batch; as suits the device"})


ARGUMENTS = (PredictArguments,)


def run(args: PredictArguments) -> Answer:
    """Read, classify, write."""
    model = _load(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    warn_of_other_tokenizer(model, tokenizer)
    texts = _texts(args)
    answers = predict(
        model,
        texts,
        tokenizer=tokenizer,
        max_batch_tokens=args.max_batch_tokens,
        early_exit=args.early_exit,
        operating_point=args.operating_point,
        progress=args.output != "-",
    )
    single = model.config.resolved_problem_type == SINGLE_LABEL
    told = []
    for text, logits, layer in zip(texts, answers.logits, answers.exit_layer.tolist(), strict=True):
        score, index = logits.softmax(-1).max(-1)
        label = {"label": model.config.id2label[int(index)], "score": float(score)}
        answer = label if single else {"logits": logits.tolist()}
        told.append({"text": text, **answer, "exit_layer": layer})
    lines = "\n".join(json.dumps(answer, ensure_ascii=False) for answer in told)
    mean = float(answers.exit_layer.double().mean()) if told else None
    values = {"rows": len(told), "mean_layers": mean, "num_layers": model.exit_layers[-1]}
    if args.output == "-":
        return Answer({**values, "answers": told}, lines)
    Path(args.output).write_text(lines + "\n" if told else "", encoding="utf-8")
    return Answer({**values, "output": args.output}, f"saved {args.output}: {len(told)} texts")


def _load(path: str) -> Any:
    if not (Path(path) / MANIFEST).is_file():
        return load_model(path)
    from ..onnx.classifier import OnnxClassifier

    return OnnxClassifier.from_pretrained(path)


def _texts(args: PredictArguments) -> list:
    if args.input == "-":
        return sys.stdin.read().splitlines()
    path = Path(args.input)
    if path.is_file() and Reading().form_of(path) in (None, "text"):
        return path.read_text(encoding="utf-8").splitlines()
    splits = load_splits(args.input)
    rows = require_split(splits, "train" if path.is_file() else args.split, args.input)
    columns = [list(rows[name]) for name in text_columns(rows.column_names)]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
