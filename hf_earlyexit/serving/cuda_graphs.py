"""CUDA graphs of whole segments of a model: captured once, replayed by a single launch.

A graph works on fixed addresses and shapes. So rows that stand end to end are written into buffers of the next larger
bucket of tokens, the graph is replayed, and what it left there is copied out. Where rows begin is a value in a buffer, so
batches of as many tokens share a graph whatever their rows are; nothing is brought from the host. How to capture is an
argument: the rest runs on a CPU too.

A batch that goes on from graph to graph is not copied: its states stay in the memory where the graph has left them, which
is lent to it until nobody refers to them any more. Each of these memories has graphs of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from ..errors import UsageError
from .capturing import HeldNumbers

GRAPHS = 2048  # a dozen segments in some eighty buckets, for each of two batches that take turns
LENT = 2  # memories for batches that go on where they stand
NARROWEST = 16  # tokens that the longest row of a bucket may have
WARM_UPS = 3  # libraries choose their kernels and take their memory in the first calls, which no graph may hold
_CAPTURING = Lock()  # torch: one capture in a process at a time

Outputs = Sequence[Tensor]
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], Any], Outputs]]
Segment = Callable[..., tuple[Tensor, Tensor | None, Outputs]]


class Shape(NamedTuple):
    """What a graph has room for: tokens, rows, and tokens of the longest row."""

    tokens: int
    rows: int
    width: int

    @classmethod
    def for_rows(cls, lengths: Sequence[int]) -> Shape:
        """The smallest that is worth a graph; rows cost little, so there are few sizes of them."""
        rows, width = (1 << (count - 1).bit_length() for count in (len(lengths), max(*lengths, NARROWEST)))
        return cls(bucket(sum(lengths)), rows, width)


class Guest:
    """Whoever has a memory lent; it is free again when nobody refers to the guest.

    Attributes:
        memory: number of the memory.
        steps: that the states there have gone on.
    """

    def __init__(self, memory: int) -> None:
        self.memory, self.steps = memory, 0


class StayAt(NamedTuple):
    """The states of a guest behind some steps: see `walking.step.Stay`."""

    guest: Guest
    steps: int

    def check(self) -> None:
        """Raise a `RuntimeError` if the states have gone on."""
        if self.guest.steps != self.steps:
            raise RuntimeError("These hidden states have gone on in the memory of a graph; they cannot be used again.")


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
    """Buffers `[tokens, H]`, `[rows + 1]` and `[rows, ...]` of a segment, and how to replay it once it has been captured.

    Beside them stand the numbers that it took from the host when it ran first, which the graph reads where they are.
    """

    hidden: Tensor
    bounds: Tensor
    of_rows: list[Tensor]
    replay: Callable[[], Any] | None = None
    outputs: Outputs = ()
    numbers: HeldNumbers = field(default_factory=HeldNumbers)

    def fill(self, hidden: Tensor, bounds: Tensor, of_rows: Sequence[Tensor]) -> None:
        """Write a batch to the front of the buffers; further rows are empty, and what is known of them means nothing."""
        if hidden.data_ptr() != self.hidden.data_ptr():
            self.hidden[: len(hidden)] = hidden
        self.hidden[len(hidden) :].zero_()
        self.bounds[: len(bounds)] = bounds
        self.bounds[len(bounds) :].fill_(len(hidden))
        for held, values in zip(self.of_rows, of_rows, strict=True):
            held[: len(values)] = values


class SegmentGraphs:
    """Runs segments of a model on rows that stand end to end, and captures those that come again with the same bucket.

    Threads may share it as long as they work on the same stream.

    Args:
        capture: takes a function without arguments; returns what does the same again, and the tensors that it fills.
        limit: most graphs that are kept, at least 1; the one not used for longest goes first.
    """

    def __init__(self, capture: Capture, limit: int = GRAPHS) -> None:
        self.capture, self.limit = capture, limit
        self.buckets: OrderedDict[Hashable, Bucket] = OrderedDict()
        self._memories: list[Tensor | None] = [None] * (LENT + 1)  # the last one is lent to nobody
        self._guests: list[ReferenceType[Guest] | None] = [None] * LENT
        self._bounds: Tensor | None = None
        self._lock = Lock()

    def run(
        self,
        name: Hashable,
        segment: Segment,
        hidden: Tensor,
        bounds: Tensor,
        lengths: Sequence[int],
        of_rows: Sequence[Tensor] = (),
        stay: StayAt | None = None,
        lend: bool = False,
    ) -> tuple[Tensor, Outputs, StayAt | None]:
        """What a segment makes of a batch; to be called in inference mode.

        Args:
            name: of the segment; the same name must always mean the same computation.
            segment: takes hidden states `[tokens, H]`, where rows begin and the last one ends `[rows + 1]`, the most tokens
                of a row, and what else is given of the rows; returns new hidden states of the same shape, the order to put
                their tokens in `[tokens]`, `None` for as they are, and other tensors with the rows first. It may not look at
                any value.
            hidden: of rows that stand end to end `[T, H]`.
            bounds: where each row begins and the last one ends, on the device `[B + 1]`.
            lengths: tokens of each of the B rows.
            of_rows: what else the segment reads, `[B, ...]` each; always as many, of the same shapes and dtypes.
            stay: where `hidden` stands, if it was left there by a call before.
            lend: leave the new states where they are, if a memory is free or `stay` has one.

        Returns:
            Hidden states `[T, H]`, the others' first B rows in new tensors, and where the states stand; `None` where they
            are in a new tensor.

        Raises:
            UsageError: if the segment cannot be captured.
        """
        shape = Shape.for_rows(lengths)
        with self._lock:
            guest = self._guest(stay) if lend else None
            memory = LENT if guest is None else guest.memory
            known = self.buckets.pop((name, shape, memory), None)
            held = known or Bucket(
                *self._buffers(shape, hidden, memory), [_for_rows(shape.rows, values) for values in of_rows]
            )
            self.buckets[name, shape, memory] = held
            if len(self.buckets) > self.limit:
                self.buckets.popitem(last=False)

            def body() -> Outputs:
                with held.numbers:
                    result, order, outputs = segment(held.hidden, held.bounds, shape.width, *held.of_rows)
                if order is None:
                    held.hidden.copy_(result)
                else:
                    torch.index_select(result, 0, order, out=held.hidden)
                return outputs

            held.fill(hidden, bounds, of_rows)
            if known is not None and held.replay is None:
                given = hidden if guest is None else hidden.clone()
                try:
                    held.replay, held.outputs = self._captured(name, body)
                finally:
                    held.fill(given, bounds, of_rows)  # warming up has written on the buffers
            if held.replay is None:  # what comes but once is not worth a graph
                outputs = body()
            else:
                held.replay()
                outputs = held.outputs
            result = held.hidden[: len(hidden)]
            if guest is not None:
                guest.steps += 1
            kept = [part[: len(lengths)].clone() for part in outputs]
            return (result.clone(), kept, None) if guest is None else (result, kept, StayAt(guest, guest.steps))

    def _guest(self, stay: StayAt | None) -> Guest | None:
        """Who has a memory lent already, or gets one now; `None` if all are taken."""
        if stay is not None:
            return stay.guest
        for memory, known in enumerate(self._guests):
            if known is None or known() is None:
                guest = Guest(memory)
                self._guests[memory] = ref(guest)
                return guest
        return None

    def _captured(self, name: Hashable, body: Callable[[], Outputs]) -> tuple[Callable[[], Any], Outputs]:
        try:
            return self.capture(body)
        except RuntimeError as error:
            raise UsageError(
                f"A part of the model, {name}, cannot be captured as a CUDA graph: {error}. Pass cuda_graphs=False, or see "
                "to it that its layers, exits and policy do not look at values on the host.",
                field="cuda_graphs",
            ) from error

    def _buffers(self, shape: Shape, hidden: Tensor, memory: int) -> tuple[Tensor, Tensor]:
        """Views of one memory for all buckets of its number, and of one for their bounds, which are used up in a call."""
        room = self._memories[memory]
        if room is None or len(room) < shape.tokens:
            size = max(shape.tokens, 0 if room is None else 2 * len(room))
            self._memories[memory] = room = hidden.new_empty(size, hidden.shape[-1])
        if self._bounds is None or len(self._bounds) <= shape.rows:
            self._bounds = torch.empty(2 * shape.rows + 1, dtype=torch.long, device=hidden.device)
        return room[: shape.tokens], self._bounds[: shape.rows + 1]


def _for_rows(rows: int, values: Tensor) -> Tensor:
    """A buffer for values `[B, ...]` of so many rows; whatever reads it finds values that a row may have."""
    return values.new_zeros(rows, *values.shape[1:])


def bucket(count: int) -> int:
    """A count rounded up to three binary digits and zeros: four steps to the double, less than a quarter too many."""
    step = 1 << max(count.bit_length() - 3, 0)
    return -(-count // step) * step
