"""CUDA graphs of whole segments of a model: captured once, replayed by a single launch.

A graph works on fixed addresses and shapes. So a batch is written into buffers of the next larger bucket, the graph is
replayed, and what it left there is copied out. How to capture is an argument, so that all the rest runs on a CPU too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

GRAPHS = 1024  # a dozen segments in some eighty buckets
WARM_UPS = 3  # libraries choose their kernels and take their memory in the first calls, which no graph may hold
_CAPTURING = Lock()  # torch: one capture in a process at a time

Outputs = Sequence[Tensor]
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], Any], Outputs]]
Segment = Callable[[Tensor, Tensor], tuple[Tensor, Outputs]]


class CudaCapture:
    """Captures what a function does on a CUDA device. No graphs of one `CudaCapture` may be replayed side by side.

    Args:
        device: where the function's tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream, self.pool = device, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, body: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
        """Warm up and capture.

        Args:
            body: the function; it may neither allocate what it keeps nor wait for the device.

        Returns:
            What does it again, on the current stream, and the tensors that it then fills.
        """
        with _CAPTURING, torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                for _ in range(WARM_UPS):
                    body()
            current.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                outputs = body()
        return graph.replay, outputs


@dataclass
class Bucket:
    """Buffers `[B, T, H]` and `[B, T]` of a segment, and how to replay it once it has been captured."""

    hidden: Tensor
    tokens: Tensor
    replay: Callable[[], Any] | None = None
    outputs: Outputs = ()

    def fill(self, hidden: Tensor, tokens: Tensor) -> None:
        """Write a batch into the corner of the buffers; nothing is left of the one before."""
        rows, width = tokens.shape
        self.hidden.zero_()
        self.tokens.zero_()
        self.hidden[:rows, :width] = hidden
        self.tokens[:rows, :width] = tokens


class SegmentGraphs:
    """Runs segments of a model on padded rows, and captures those that come again with the same bucket.

    Threads may share it as long as they work on the same stream.

    Args:
        capture: takes a function without arguments; returns what does the same again, and the tensors that it fills.
        limit: most graphs that are kept, at least 1; the one not used for longest goes first.
    """

    def __init__(self, capture: Capture, limit: int = GRAPHS) -> None:
        self.capture, self.limit = capture, limit
        self.buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        self._hidden: Tensor | None = None
        self._tokens: Tensor | None = None
        self._lock = Lock()

    def run(self, name: Hashable, segment: Segment, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Outputs]:
        """What a segment makes of a batch; to be called in inference mode.

        Args:
            name: of the segment; the same name must always mean the same computation.
            segment: takes hidden states and tokens; returns hidden states of the same shape, and other tensors with the rows
                first. It may not look at any value.
            hidden: `[B, T, H]`.
            tokens: True at real tokens `[B, T]`.

        Returns:
            New tensors: hidden states `[B, T, H]`, and the others' first B rows.

        Raises:
            UsageError: if the segment cannot be captured.
        """
        rows, width = tokens.shape
        shape = (bucket(rows), 8 * bucket(-(-width // 8)))  # attention kernels like widths in eights
        with self._lock:
            known = self.buckets.pop((name, shape), None)
            held = known or Bucket(*self._buffers(shape, hidden))
            self.buckets[name, shape] = held
            if len(self.buckets) > self.limit:
                self.buckets.popitem(last=False)

            def body() -> Outputs:
                result, outputs = segment(held.hidden, held.tokens)
                held.hidden.copy_(result)
                return outputs

            held.fill(hidden, tokens)
            if known is None:  # what comes but once is not worth a graph
                outputs = body()
            else:
                if held.replay is None:
                    held.replay, held.outputs = self._captured(name, body)
                    held.fill(hidden, tokens)  # warming up has written on the buffers
                held.replay()
                outputs = held.outputs
            kept = [part[:rows].clone() for part in outputs]
            return held.hidden[:rows, :width].clone(), kept

    def _captured(self, name: Hashable, body: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
        try:
            return self.capture(body)
        except RuntimeError as error:
            raise UsageError(
                f"A part of the model, {name}, cannot be captured as a CUDA graph: {error}. Pass cuda_graphs=False, or see "
                "to it that its layers and exits do not look at values on the host.",
                field="cuda_graphs",
            ) from error

    def _buffers(self, shape: tuple[int, int], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Views of one memory for all buckets: whatever they hold is used up before the next one is filled."""
        size, width = shape[0] * shape[1], hidden.shape[-1]
        if self._hidden is None or self._tokens is None or len(self._hidden) < size:
            size = max(size, 0 if self._hidden is None else 2 * len(self._hidden))
            self._hidden = hidden.new_empty(size, width)
            self._tokens = torch.empty(size, dtype=torch.bool, device=hidden.device)
        size = shape[0] * shape[1]
        return self._hidden[:size].view(*shape, width), self._tokens[:size].view(shape)


def bucket(count: int) -> int:
    """A count rounded up to three binary digits and zeros: four steps to the double, less than a quarter too many."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
