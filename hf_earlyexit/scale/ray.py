"""Ray Data: blocks of rows, answered by processes that load the model once. Ray itself is imported when it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..doors import from_pretrained
from ..modeling.protocol import ExitClassifier
from ..onnx.manifest import MANIFEST
from ..problem_types import SINGLE_LABEL
from ..serving.pictures import PICTURE_COLUMNS, picture_columns
from ..serving.predict import Predictions
from ..serving.predict import predict as predict_rows
from ..serving.reader import reads_images
from ..serving.tables import PIXELS, text_columns
from ..values import check_whole, is_whole, unexpected

ROWS, PICTURES = 4096, 256  # of a block
ADDED = ("label", "score", "logits", "exit_layer", "error")
FILE = "bytes"  # what Ray calls the column of files that it has read


class Classify:
    """What one process does: it loads the model when it starts, and adds answers to every block.

    Args:
        folder: folder or Hub id of a model with exits and what reads its rows; or a folder of ONNX files.
        device: as torch names it.
        columns: that hold the texts, one or two, or the pictures; by default the usual names.
        options: of `predict`, such as operating_point.
    """

    def __init__(self, folder: str, device: str, columns: tuple[str, ...] | None, options: Mapping[str, Any]) -> None:
        torch.set_num_threads(1)
        self.model, self.parts = load_served(folder)
        if device != "cpu":
            self.model = self.model.to(device)
        self.columns, self.options = columns, dict(options)

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, Any]:
        """The block with its answers; columns of theirs that had these names are called input_... ."""
        answers = predict_rows(self.model, self._rows(block), **self.parts, **self.options)
        kept = {f"input_{name}" if name in ADDED else name: values for name, values in block.items()}
        return {**kept, **answer_columns(self.model, answers)}

    def _rows(self, block: Mapping[str, np.ndarray]) -> list[Any]:
        if reads_images(self.model):
            (name,) = self.columns or ((FILE,) if FILE in block else picture_columns(block))
            if name == PIXELS:
                return [{PIXELS: value} for value in block[name]]
            return [{FILE: value} if isinstance(value, bytes) else value for value in block[name]]
        columns = [list(map(_text, block[name])) for name in self.columns or text_columns(block)]
        return columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))


def load_served(folder: str) -> tuple[Any, dict[str, Any]]:
    """A model and what reads its rows, by the name of the argument that takes it."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if (Path(folder) / MANIFEST).is_file():
        from ..onnx.classifier import OnnxClassifier

        model: Any = OnnxClassifier.from_pretrained(folder, threads=1)
    else:
        model = from_pretrained(folder).eval()
    if reads_images(model):
        return model, {"image_processor": AutoImageProcessor.from_pretrained(folder)}
    return model, {"tokenizer": AutoTokenizer.from_pretrained(folder)}


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, np.str_) else value


def answer_columns(model: ExitClassifier, answers: Predictions) -> dict[str, Any]:
    """Columns of N rows: label and score, or logits where labels are no single one, and exit_layer.

    Args:
        model: for the names of its labels.
        answers: of the rows.
    """
    columns: dict[str, Any] = {}
    if model.config.resolved_problem_type == SINGLE_LABEL and answers.logits.shape[1] > 1:
        scores, labels = answers.logits.softmax(-1).max(-1)
        names = np.array([str(model.config.id2label[number]) for number in range(answers.logits.shape[1])], dtype=object)
        columns["label"] = names[labels.numpy()] if len(labels) else np.array([], dtype=object)
        columns["score"] = scores.numpy()
    else:
        columns["logits"] = answers.logits.numpy()
    columns["exit_layer"] = answers.exit_layer.numpy()
    return columns


def predict(
    dataset: Any,
    folder: str | PathLike[str],
    *,
    operating_point: str | None = None,
    early_exit: bool | None = None,
    layer_budget: int | None = None,
    max_length: int | None = None,
    max_batch_tokens: int | None = None,
    columns: tuple[str, ...] | list[str] | None = None,
    workers: int | tuple[int, int] = 1,
    batch_size: int | None = None,
    device: str = "cpu",
    classify: Callable[..., Any] = Classify,
) -> Any:
    """Classify the rows of a Ray data set, lazily: columns label, score and exit_layer are added to each.

    Processes that each load the model once answer block by block. A process that dies is started anew and its block run
    again, so no row is lost or doubled. A row's label and layer do not depend on how rows are split into blocks. Where a row
    cannot be read, the run ends with what is wrong with it.

    Args:
        dataset: a `ray.data.Dataset` of texts, pairs of texts, or pictures: arrays, or files as bytes. Ray keeps its
            order if told: `ray.data.DataContext.get_current().execution_options.preserve_order = True`.
        folder: folder or Hub id that every process can read; or a folder of ONNX files.
        operating_point, early_exit, layer_budget, max_length, max_batch_tokens: as for `predict`.
        columns: of the texts, one or two, or of the pictures; by default the usual names.
        workers: how many processes, each with one thread; or fewest and most of them.
        batch_size: rows of a block; by default 4,096 texts, and 256 where a column is of pictures. Rows of one block are
            sorted by length, so bigger ones run faster.
        device: "cpu", or "cuda": a GPU for each process.
        classify: the class whose objects answer.

    Returns:
        A data set with the columns; what was called so before is called input_label and the like. Models of several labels
        or of values get logits in place of label and score.

    Raises:
        UsageError: for numbers out of range.
    """
    import ray
    from ray.data import ActorPoolStrategy

    bounds: Any = (workers, workers) if is_whole(workers, 1) else workers
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2 or not all(is_whole(one, 1) for one in bounds):
        raise unexpected("workers", workers, "how many, or fewest and most")
    if batch_size is not None:
        check_whole(1, batch_size=batch_size)
    else:
        batch_size = PICTURES if set(columns or dataset.columns()) & {FILE, PIXELS, *PICTURE_COLUMNS} else ROWS
    if not ray.is_initialized():
        ray.init(include_dashboard=False)
    given: dict[str, Any] = {
        "operating_point": operating_point,
        "early_exit": early_exit,
        "layer_budget": layer_budget,
        "max_length": max_length,
        "max_batch_tokens": max_batch_tokens,
    }
    place = str(Path(folder).resolve()) if Path(folder).exists() else str(folder)
    return dataset.map_batches(
        classify,
        fn_constructor_args=(place, device, None if columns is None else tuple(columns), given),
        batch_size=batch_size,
        batch_format="numpy",
        compute=ActorPoolStrategy(min_size=bounds[0], max_size=bounds[1]),
        num_cpus=cores_of_a_worker(bounds[1]),
        num_gpus=None if device == "cpu" else 1,
    )


def cores_of_a_worker(workers: int) -> float:
    """Cores that Ray sets aside for each: whole ones, unless nothing would then be left to read rows with."""
    import ray

    cores = float(ray.cluster_resources().get("CPU", 1.0))  # type: ignore[no-untyped-call]
    return 1.0 if cores > workers else max(cores - 1, 0.0) / workers
