"""A model in ONNX Runtime: with exits, and as everybody exports it, in full or cut off."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic

from ..errors import UsageError
from ..modeling.protocol import TorchExitClassifier
from ..onnx.classifier import OnnxClassifier, open_session
from ..onnx.export import one_file
from ..onnx.fixed_scales import batches_of, find_roundings
from ..onnx.graphs import inputs_of, subgraph
from ..onnx.inputs import picture_shape
from ..onnx.layer_files import cut_pieces
from ..onnx.one_row import OneRow
from ..onnx.quantize import quantize_graph
from ..onnx.walk import logits_of, walk_graph
from ..serving.batching import pad_batch
from ..serving.graph_walker import walker_for
from ..serving.reader import reader_for
from ..serving.rows import TokenIds
from ..serving.scheduler import Scheduler
from .ways import EARLY, FIRST, FORWARD, FULL, ONE_FILE, Run, Ways, exit_at


class OnnxForm:
    """One torch model in ONNX Runtime, in one number format.

    In full and cut off it is what `torch.onnx.export` and, in 8 bits, ONNX Runtime's own `quantize_dynamic` give: one graph
    that answers batches of rows of similar length; with fixed scales it is made as our own export is. With early exit it is
    what `export_onnx` writes: a file for each layer, and one file that stops by itself.

    Args:
        model: a float32 classifier with exits and a policy, on the CPU. It is not changed.
        int8: in 8 bits. The policy stays as it is: good enough to time it, not to serve it.
        threads: that one session may use; as many as torch uses by default.
        scale_rows: with `int8`, encoded rows that fix the scales; see `export_onnx`.

    Raises:
        UsageError: for a model that cannot be exported, or that has no policy.
    """

    def __init__(
        self, model: TorchExitClassifier, int8: bool = False, threads: int | None = None, scale_rows: Any = None
    ) -> None:
        if model.exit_policy is None:
            raise UsageError("The model has no exit policy; calibrate it and call set_exit_policy first.", field="model")
        self.threads, self.int8 = threads or torch.get_num_threads(), int8
        self.plain = walk_graph(model)
        self.roundings = None
        if scale_rows is not None:
            batches = batches_of(model, scale_rows, reader_for(model), picture_shape(model, None))
            self.roundings = find_roundings(self.plain, batches)
        whole = quantize_graph(self.plain, roundings=self.roundings) if int8 else self.plain
        self.served = OnnxClassifier(
            copy.deepcopy(model.config),
            cut_pieces(whole, model.config).__getitem__,
            "timed only",
            "int8" if int8 else "float32",
            self.threads,
            static=scale_rows is not None,
        )

    def ways(self, batch_size: int, static_layer: int) -> Ways:
        """In full, cut off after `static_layer`, and with early exit; batches are of `batch_size` rows, sorted by length."""
        served = self.served
        last, static = len(served.exit_layers) - 1, exit_at(served.exit_layers, static_layer)
        policy = served.exit_policy
        assert policy is not None  # looked at when it was made
        early = Scheduler(walker_for(served), policy, served.walker.best_batch_tokens)
        whole, short = self._session(last), self._session(static)
        one = self._open(one_file(self.plain, served.config, policy, self.int8, self.roundings))
        first, alone = FIRST.format(static_layer), copy.copy(served)
        alone.walker = copy.copy(served.walker)
        alone.walker.one_row = OneRow(lambda: one, dict(served.config.exit_policy))
        return Ways(
            many={FULL: by_length(whole, batch_size), EARLY: early.run, first: by_length(short, batch_size)},
            single={FULL: by_length(whole, 1), FORWARD: partial(_row_by_row, alone), EARLY: early.run,
                    ONE_FILE: by_length(one, 1), first: by_length(short, 1)},
        )  # fmt: skip

    def _session(self, exit_index: int) -> ort.InferenceSession:
        """The plain graph up to one exit."""
        graph = subgraph(
            self.plain, inputs_of(self.plain), {logits_of(exit_index): (TensorProto.FLOAT, ("batch", "classes"))}
        )
        if self.roundings is not None:
            return self._open(quantize_graph(graph, roundings=self.roundings).SerializeToString())
        return self._open(_in_8_bits(graph) if self.int8 else graph.SerializeToString())

    def _open(self, data: bytes) -> ort.InferenceSession:
        return open_session(lambda _: data, "model.onnx", self.threads)


def _row_by_row(model: OnnxClassifier, rows: Sequence[TokenIds]) -> None:
    for row in rows:
        model(**pad_batch([row]))


def by_length(session: ort.InferenceSession, batch_size: int) -> Run:
    """Rows through one graph, in padded batches of rows of similar length."""
    asked = {info.name for info in session.get_inputs()}

    def run(rows: Sequence[TokenIds]) -> list[np.ndarray]:
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].get("input_ids", ())))  # pictures have one size
        answers: list[np.ndarray] = []
        for start in range(0, len(rows), batch_size):
            batch = pad_batch([rows[row] for row in order[start : start + batch_size]])
            given = {name: values.numpy() for name, values in batch.items()}
            if "token_type_ids" in asked and "token_type_ids" not in given:
                given["token_type_ids"] = np.zeros_like(given["input_ids"])
            answers.append(session.run(None, {name: values for name, values in given.items() if name in asked})[0])
        return answers

    return run


def _in_8_bits(graph: ModelProto) -> bytes:
    """As ONNX Runtime's own tool makes it: weights by column, inputs by the whole batch."""
    level = logging.getLogger().level
    logging.getLogger().setLevel(logging.ERROR)  # the tool's advice on what is done already
    try:
        with TemporaryDirectory() as folder:
            small = Path(folder) / "small.onnx"
            quantize_dynamic(graph, small, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
            return small.read_bytes()
    finally:
        logging.getLogger().setLevel(level)
