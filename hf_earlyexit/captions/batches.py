"""Images of a data set, or features of them, as batches for a captioner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..images import open_image

FEATURES, PIXELS, IMAGE = "encoder_hidden_states", "pixel_values", "image"


def image_inputs(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the model's `forward` takes of some rows: `encoder_outputs` of cached features, else `pixel_values`.

    Args:
        rows: each with `encoder_hidden_states`, the encoder's last states `[tokens, width]`, or `pixel_values`.

    Raises:
        DataError: for rows with neither, or of different shapes.
    """
    column = next((name for name in (FEATURES, PIXELS) if name in rows[0]), None)
    if column is None:
        raise DataError(
            f"The rows have {', '.join(rows[0]) or 'no columns'}; expected {PIXELS}, as an image processor makes them, or "
            f"{FEATURES}, the encoder's last states.",
            field=PIXELS,
        )
    parts = [torch.as_tensor(np.asarray(row[column]), dtype=torch.float32) for row in rows]
    shapes = sorted({tuple(part.shape) for part in parts})
    if len(shapes) > 1:
        raise DataError(f"{column} of one batch have shapes {shapes}; expected the same for every image.", field=column)
    stacked = torch.stack(parts)
    return {"encoder_outputs": (stacked,)} if column == FEATURES else {PIXELS: stacked}


def image_batches(rows: Any, image_processor: Any, batch_size: int) -> Iterator[dict[str, Any]]:
    """Batches of `image_inputs`, in the order of the rows.

    Args:
        rows: a data set or list of rows with `encoder_hidden_states`, `pixel_values` or `image`; or a list of pictures; or
            pixel values `[N, channels, height, width]`.
        image_processor: needed for pictures.
        batch_size: images in a batch.

    Raises:
        DataError: for no rows, or rows without images.
        UsageError: for pictures without a processor.
    """
    if not hasattr(rows, "__len__") or len(rows) == 0:
        raise DataError("There are no images; expected a data set or a list with at least one.", field="rows")
    for first in range(0, len(rows), batch_size):
        if isinstance(rows, Tensor):
            yield {PIXELS: rows[first : first + batch_size]}
            continue
        batch = [rows[place] for place in range(first, min(first + batch_size, len(rows)))]
        if isinstance(batch[0], Mapping) and IMAGE not in batch[0]:
            yield image_inputs(batch)
            continue
        if image_processor is None:
            raise UsageError("The rows hold pictures; pass the model's image_processor.", field="image_processor")
        pictures = [open_image(row[IMAGE] if isinstance(row, Mapping) and IMAGE in row else row, IMAGE) for row in batch]
        yield {PIXELS: image_processor(pictures, return_tensors="pt")[PIXELS]}
