"""Between host and device without waiting: one wait for CUDA is a wait for everything it has been given to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Index = Tensor | slice


def sent(mask: Tensor) -> Callable[[], list[bool]]:
    """Send booleans `[B]` to the host.

    Returns:
        A function that waits for them, and for nothing that CUDA was given to do after them.
    """
    if mask.device.type != "cuda":
        return mask.tolist
    host = torch.empty(mask.shape, dtype=mask.dtype, pin_memory=True)
    host.copy_(mask, non_blocking=True)
    arrived = torch.cuda.current_stream(mask.device).record_event()

    def wait() -> list[bool]:
        arrived.synchronize()
        return host.tolist()

    return wait


def placed(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; one of the host is there in time for what the device is given to do next."""
    if device.type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def index_of(rows: Sequence[int], device: torch.device) -> Index:
    """Positions of rows, at least one, as an index on the device; a slice, which brings nothing there, of neighbours."""
    first, behind = rows[0], rows[0] + len(rows)
    return slice(first, behind) if list(rows) == list(range(first, behind)) else placed(torch.tensor(rows), device)


def chosen(values: Tensor, index: Index) -> Tensor:
    """Some rows of `[B, ...]`; a view of neighbours."""
    return values[index] if isinstance(index, slice) else values.index_select(0, index)


def finished(device: torch.device) -> None:
    """Wait until a device has done what it was given to do, as a clock must."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
