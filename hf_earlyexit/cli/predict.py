"""Classify the lines of a file, or the texts of a data set, as JSON lines with the layer each left after.

    hf-earlyexit predict --model bert-with-exits --input texts.txt --output answers.jsonl

Each line of the output is one JSON object; exit_layer tells where the text left.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..inference.predict import predict
from ..inference.rows import text_columns
from ..modeling.certificate import warn_of_other_tokenizer
from ..onnx.manifest import MANIFEST
from ..problems import SINGLE_LABEL
from ..training.data import READERS, load_splits, require_split


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


def run(args: PredictArguments) -> None:
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
    with nullcontext(sys.stdout) if args.output == "-" else open(args.output, "w", encoding="utf-8") as file:
        for text, logits, layer in zip(texts, answers.logits, answers.exit_layer.tolist(), strict=True):
            if single:
                score, label = logits.softmax(-1).max(-1)
                told = {"label": model.config.id2label[int(label)], "score": float(score)}
            else:
                told = {"logits": logits.tolist()}
            file.write(json.dumps({"text": text, **told, "exit_layer": layer}, ensure_ascii=False) + "\n")


def _load(path: str) -> Any:
    if not (Path(path) / MANIFEST).is_file():
        return AutoModelForSequenceClassification.from_pretrained(path)
    from ..onnx.classifier import OnnxClassifier

    return OnnxClassifier.from_pretrained(path)


def _texts(args: PredictArguments) -> list:
    if args.input == "-":
        return sys.stdin.read().splitlines()
    path = Path(args.input)
    if path.is_file() and path.suffix not in READERS:
        return path.read_text(encoding="utf-8").splitlines()
    splits = load_splits(args.input)
    rows = require_split(splits, "train" if path.is_file() else args.split, args.input)
    columns = [list(rows[name]) for name in text_columns(rows.column_names)]
    return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
