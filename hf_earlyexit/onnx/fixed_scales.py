"""Fixed scales of what a model's products read, found on rows: 8 bits without a look at every token."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor

from ..errors import DataError
from ..modeling.protocol import TorchExitClassifier
from ..serving.batching import padding_token, sorted_batches
from ..serving.reader import PICTURES, RowReader, first_error
from ..serving.rows import check_any_token
from ..serving.walker import ModelWalker
from .classifier import open_session
from .graphs import serialized
from .inputs import picture_batch, text_batch
from .quantize import Rounding, products

TO_WEIGHTS = 0.8  # how much of a channel's size its weights take over: 0 none of it, 1 all
LEAST = 0.3  # of the mean size of all channels: none is taken to be smaller, whatever its values on these rows
UNITS = 255
BATCH_TOKENS = 512


def find_roundings(whole: ModelProto, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Rounding]:
    """How to round what every product reads, so that all values on some rows fit.

    A few channels are far larger than the others, so a step for all of them would round the others away. Each channel has a
    step of its own, which the weights that read it take over, to the power of `TO_WEIGHTS` (SmoothQuant, Xiao et al. 2023,
    arXiv:2211.10438, section 4). Real tokens count alone. No label is looked at.

    Args:
        whole: from `walk_graph`.
        batches: at least one, as `batches_of` gives them.

    Raises:
        DataError: where the model computes values that are not finite.
        UsageError: for a model that is too large for one graph.
    """
    matrices: dict[str, list[np.ndarray]] = {}
    for node, weight in products(whole.graph):
        matrices.setdefault(node.input[0], []).append(numpy_helper.to_array(weight))
    probe = ModelProto()
    probe.CopyFrom(whole)
    del probe.graph.output[:]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in matrices)
    data = serialized(probe, "leave scale_rows out")
    session = open_session(lambda _: data, "the float32 graph", 1)
    low: dict[str, np.ndarray] = {}
    high: dict[str, np.ndarray] = {}
    for batch in batches:
        given = {name: values.numpy() for name, values in batch.items()}
        real = None if "attention_mask" not in given else given["attention_mask"].astype(bool)
        for name, values in zip(matrices, session.run(None, given), strict=True):
            seen = values[real] if real is not None and values.shape[:2] == real.shape else values
            seen = seen.reshape(-1, values.shape[-1])
            low[name] = np.minimum(low.get(name, 0), seen.min(0))
            high[name] = np.maximum(high.get(name, 0), seen.max(0))
            if not np.isfinite([low[name], high[name]]).all():
                raise DataError("The model computes values that are not finite on scale_rows.", field="scale_rows")
    return {name: _rounding(low[name], high[name], read_by) for name, read_by in matrices.items()}


def _rounding(low: np.ndarray, high: np.ndarray, matrices: list[np.ndarray]) -> Rounding:
    """Steps by which the values of every channel, from `low` to `high` `[K]`, fit into 8 bits."""
    size = np.maximum(-low, high)
    size = np.maximum(size, max(LEAST * size.mean(), 1e-30))
    weight = np.max([np.abs(matrix).max(1) for matrix in matrices], axis=0)
    factor = size**TO_WEIGHTS / np.maximum(weight, 1e-30) ** (1 - TO_WEIGHTS)
    least, most = float((low / factor).min()), float((high / factor).max())
    unit = max(most - least, 1e-30) / UNITS
    return Rounding((factor * unit).astype(np.float32), round(-least / unit))


def batches_of(
    model: TorchExitClassifier, rows: Any, reader: RowReader, picture: tuple[int, ...] | None
) -> Iterator[dict[str, Tensor]]:
    """Rows in batches as a graph reads them.

    Args:
        model: whose rows they are.
        rows: texts, token ids or pictures, with or without labels; as for `collect_trace`.
        reader: of them.
        picture: channels, height and width of the pictures the graph takes.

    Raises:
        DataError: for no rows, or one that the model cannot read, naming it.
    """
    walker, encoded = ModelWalker(model), reader.encode_all(rows)
    if not len(encoded):
        raise DataError("scale_rows holds no rows; expected at least one, best a thousand.", field="scale_rows")
    size = PICTURES if reader.images else len(encoded)
    for first in range(0, len(encoded), size):
        window = encoded[first : first + size]
        first_error(window, walker.check, first)
        if picture is None:
            first_error(window, check_any_token, first)
        for _, batch in sorted_batches(window, BATCH_TOKENS, padding_token(model.config), walker.length):
            yield text_batch(dict(batch), *walker.known) if picture is None else picture_batch(dict(batch), picture)


def digest(roundings: Mapping[str, Rounding]) -> str:
    """A name for these very roundings."""
    found = hashlib.sha256()
    for name, rounding in sorted(roundings.items()):
        found.update(f"{name} {rounding.zero} ".encode() + rounding.steps.tobytes())
    return found.hexdigest()
