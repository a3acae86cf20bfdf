"""Chunks on their way: which goes next, who waits for whom at which depth, and where they meet."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .answers import Leaving
from .chunks import Chunk, Flight, called_off, join_chunks, some_rows

if TYPE_CHECKING:
    from .scheduler import Scheduler
    from .shadow import Shadow


class Course:
    """The chunks of one model and policy that are under way; for one thread at a time.

    Args:
        scheduler: runs them.
        arriving: the next chunk of new rows, or `None` if there is none now.
        let_go: told of rows that leave.
        max_wait: seconds after which a chunk waits for company no longer, though new rows come; `inf` in a window, where
            the fullest batches are the fastest.
        off: tells of places why a row is to go no further, `None` for those that go on; asked before every launch.
        broken: told of places whose layers have failed, with the error; the rows of a chunk that fails are run one by one
            to find out whose it is. Without it, the error is raised.
        shadow: follows rows that leave; steps when there is nothing else to do.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        arriving: Callable[[], Chunk | None],
        let_go: Callable[[Leaving], Any],
        max_wait: float = math.inf,
        off: Callable[[Sequence[Any]], Sequence[str | None]] | None = None,
        broken: Callable[[Sequence[Any], Exception], Any] | None = None,
        shadow: Shadow | None = None,
    ) -> None:
        self.scheduler, self.arriving, self.let_go, self.max_wait = scheduler, arriving, let_go, max_wait
        self.off, self.broken, self.shadow = off, broken, shadow
        self.ready: deque[Chunk] = deque()
        self.waiting: dict[int, list[Chunk]] = {depth: [] for depth in scheduler.stops}
        self.since: dict[int, float] = {}  # when the first chunk came to a depth where some wait
        self.flying: deque[Flight] = deque()
        self.batches = self.batch_tokens = 0  # that have been launched

    @property
    def busy(self) -> bool:
        """Whether any row is under way."""
        return bool(self.ready or self.flying or any(self.waiting.values()))

    def step(self) -> bool:
        """Launch what there is room for and settle what was launched first; False if there is nothing to do."""
        while len(self.flying) < self.scheduler.lanes and (chunk := self._next()) is not None:
            self._launch(chunk)
        if not self.flying:
            return self.shadow is not None and self.shadow.step()
        stayed = self._settle(self.flying.popleft())
        if stayed is not None:
            self.enter(stayed)
        return True

    def enter(self, chunk: Chunk) -> None:
        """Let rows go on from a depth where chunks can wait, at once or with others who come there."""
        going = self._meet(self.waiting[chunk.depth], chunk)
        if going is not None:
            self.ready.append(going)

    def _next(self) -> Chunk | None:
        """The chunk to launch: one that goes on, else new rows, else those who wait and whom nobody can join any more."""
        if self.ready:
            return self.ready.popleft()
        if self.max_wait < math.inf and (depth := self._overdue()) is not None:
            return self._leave_pile(depth)
        chunk = self.arriving()
        if chunk is not None:
            return chunk
        behind = min((flight.chunk.depth for flight in self.flying), default=math.inf)
        for depth, pile in self.waiting.items():
            if pile and depth < behind:
                return self._leave_pile(depth)
        return None

    def _overdue(self) -> int | None:
        """The deepest depth where some have waited long enough."""
        late = time.monotonic() - self.max_wait
        return max((depth for depth, pile in self.waiting.items() if pile and self.since[depth] <= late), default=None)

    def _leave_pile(self, depth: int) -> Chunk:
        pile, self.waiting[depth] = self.waiting[depth], []
        return join_chunks(self.scheduler.walker, pile)

    def _launch(self, chunk: Chunk) -> None:
        going: Chunk | None = chunk
        if self.off is not None and any(reasons := self.off(chunk.places)):
            leaving, going = called_off(chunk, reasons, self.scheduler.walker.num_classes)
            self.let_go(leaving)
        if going is None:
            return
        try:
            flight = self.scheduler.launch(going, self.let_go)
        except Exception as error:
            self._find_whose(going, error)
            return
        if flight is not None:
            self.batches += 1
            self.batch_tokens += going.tokens
            self.flying.append(flight)

    def _settle(self, flight: Flight) -> Chunk | None:
        try:
            return self.scheduler.settle(flight, self._leave)
        except Exception as error:  # a device tells late of what it was given to do
            if self.broken is None:
                raise
            self.broken(flight.chunk.places, error)
            return None

    def _leave(self, chunk: Chunk, leaving: Leaving) -> None:
        self.let_go(leaving)
        if self.shadow is not None:
            self.shadow.follow(chunk, leaving)

    def _find_whose(self, chunk: Chunk, error: Exception) -> None:
        """Run the rows of a chunk that failed one by one; a row that fails by itself is told of."""
        if self.broken is None:
            raise error
        if len(chunk.places) == 1:
            self.broken(chunk.places, error)
        else:
            self.ready.extendleft(some_rows(chunk, [row]) for row in reversed(range(len(chunk.places))))

    def _meet(self, pile: list[Chunk], chunk: Chunk) -> Chunk | None:
        """The chunk that goes on from this depth, or `None` while those who wait there are too few."""
        most = self.scheduler.max_batch_tokens
        if 2 * chunk.tokens >= most:
            return chunk
        now = time.monotonic()
        if not pile:
            self.since[chunk.depth] = now
        pile.append(chunk._replace(standing=chunk.standing.on_their_own()))
        widest = max(part.width for part in pile)  # 1 where rows stand end to end
        together = widest * sum(part.standing.hidden.shape[0] for part in pile)
        if 2 * together < most:
            return None
        ready = pile[:-1] if together > most else list(pile)
        del pile[: len(ready)]
        self.since[chunk.depth] = now  # of whoever is left, who has just come
        return join_chunks(self.scheduler.walker, ready)
