"""What some rows of a trace have, or all of them."""

from __future__ import annotations

import torch
from torch import Tensor

Places = Tensor | None  # of rows `[n]`; `None` for all of them, in their order


def some(values: Tensor, places: Places) -> Tensor:
    """What those rows have of values `[N, ...]`; that of all rows is not copied."""
    return values if places is None else values.index_select(0, places)  # an index takes longer


def left_with(values: Tensor, places: Places, exits: Tensor) -> Tensor:
    """What those rows have of values `[N, E, ...]` at the exit that each takes `[n]`."""
    return values[torch.arange(len(values)) if places is None else places, exits]
