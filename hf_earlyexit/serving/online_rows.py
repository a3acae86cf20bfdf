"""One row that is to be answered, and a line of such rows: those who wait for one model at one operating point."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from ..errors import EarlyExitError
from ..modeling.finite import not_finite
from .answers import DEADLINE, Answer, Leaving
from .batching import batch_places
from .chunks import Chunk
from .course import Course
from .monitor import Monitor
from .reader import RowReader
from .scheduler import Scheduler
from .shadow import Shadow

logger = logging.getLogger(__name__)
CANCELLED = "cancelled"
ENGINE = "engine"  # field of errors that are not the row's own
TOKENS_OF_A_ROW = 8  # few; rows are read together, so that those of similar length can run together
PICTURES_AT_ONCE = 4  # opening one takes as long as many texts
_NUMBERS = itertools.count()


class RowFuture(Future[Answer]):
    """The answer of one row, to come: `result()` waits for it in a thread, `await` in a coroutine.

    Cancelled, its row runs no further layer and its place in the queue is free at once.

    Args:
        row: as it was given.
        priority: bigger goes first.
        ends_at: `time.monotonic()` from which on it runs no layer; `inf` without a deadline.
    """

    def __init__(self, row: Any, priority: float = 0, ends_at: float = math.inf) -> None:
        super().__init__()
        self.row, self.ends_at = row, ends_at
        self.order = (-priority, next(_NUMBERS))
        self.called_off = self.finished = self.queued = False
        self.leave_queue: Callable[[RowFuture], Any] | None = None

    def __lt__(self, other: RowFuture) -> bool:
        return self.order < other.order

    def __await__(self) -> Generator[Any, None, Answer]:
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Drop the row, unless it is answered already; whether it is dropped."""
        dropped = super().cancel()
        if dropped:
            self.called_off, self.row = True, None
            self.left_queue()
        return dropped

    def left_queue(self) -> None:
        """Make room for another in the queue, once."""
        leave, self.leave_queue = self.leave_queue, None
        if leave is not None:
            leave(self)

    def finish(
        self, answer: Answer | None = None, error: BaseException | None = None, count: Callable[[], Any] | None = None
    ) -> bool:
        """Hand over an answer or an error, once; whether anybody still wants it. If so, `count` is called before."""
        if self.finished:
            return False
        self.finished, self.row, self.leave_queue = True, None, None
        if not self.set_running_or_notify_cancel():
            return False
        if count is not None:
            count()
        if error is not None:
            self.set_exception(error)
        elif answer is not None:
            self.set_result(answer)
        return True


class Line:
    """The rows that wait for, or are on their way through, one model at one operating point; run by one thread.

    Args:
        scheduler: of that model and operating point.
        reader: of its rows.
        lock: held while the queue is looked at.
        max_wait: as for `Course`; `None` for what suits the model.
        monitor: sees where rows leave, and follows a share of them to the last layer; for schedulers with a policy.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        reader: RowReader,
        lock: AbstractContextManager[Any],
        max_wait: float | None,
        monitor: Monitor | None,
    ) -> None:
        self.scheduler, self.reader, self.lock, self.monitor = scheduler, reader, lock, monitor
        self.max_wait = scheduler.walker.best_wait if max_wait is None else max_wait
        self.queue: list[RowFuture] = []  # a heap; those called off stay until they are met
        self.inside: dict[RowFuture, Any] = {}  # under way, with what the model reads of them
        self.groups: dict[Hashable, deque[list[RowFuture]]] = {}  # by shape, those that make a chunk
        self.courses: dict[Hashable, Course] = {}
        most = scheduler.max_batch_tokens // TOKENS_OF_A_ROW
        self.at_once = PICTURES_AT_ONCE if reader.images else max(most, 1)
        self.batches = self.batch_tokens = self.failed = self.num_answered = 0

    @property
    def busy(self) -> bool:
        """Whether any row waits or is under way."""
        return bool(self.queue or self.inside or self.courses)

    def put(self, future: RowFuture) -> None:
        """Add a row; the caller holds the lock."""
        heapq.heappush(self.queue, future)

    def forget_called_off(self) -> None:
        """Drop those from the queue who have been called off; the caller holds the lock."""
        staying = [future for future in self.queue if not future.called_off]
        for future in self.queue:
            if future.called_off:
                future.finish()
        heapq.heapify(staying)
        self.queue = staying

    def step(self) -> None:
        """Run one chunk of each shape to its next exit."""
        if not self.courses:
            self._admit()
        for shape, course in list(self.courses.items()):
            batches, tokens = course.batches, course.batch_tokens
            if not course.step() and not self.groups.get(shape):
                del self.courses[shape]
                self.groups.pop(shape, None)
            self.batches += course.batches - batches
            self.batch_tokens += course.batch_tokens - tokens

    def fail_all(self, error: Callable[[], BaseException]) -> None:
        """Give every row an error of its own, and forget what was under way; nobody else knows the line any more."""
        with self.lock:
            futures, self.queue = [*self.inside, *self.queue], []
            for future in futures:
                future.left_queue()
        self.inside, self.groups, self.courses = {}, {}, {}
        for future in futures:
            future.finish(error=error(), count=self._count_failure)

    # --- in ---------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let rows in from the queue: read them, and sort those that can be read into chunks."""
        with self.lock:
            futures = [heapq.heappop(self.queue) for _ in range(min(self.at_once, len(self.queue)))]
            rows = [future.row for future in futures]
            for future in futures:
                future.left_queue()
        now, shapes = time.monotonic(), dict[Hashable, list[RowFuture]]()
        wanted: list[tuple[RowFuture, Any]] = []
        for future, row in zip(futures, rows, strict=True):
            if future.called_off:
                future.finish()
            elif future.ends_at <= now:
                nothing = torch.full((self.scheduler.walker.num_classes,), torch.nan)
                future.finish(Answer(nothing, 0, math.nan, DEADLINE, None), count=self._count_answer)
            else:
                wanted.append((future, row))
        self.inside.update(wanted)
        for (future, _), encoded in zip(wanted, self._read([row for _, row in wanted]), strict=True):
            if isinstance(encoded, BaseException):
                self._fail(future, encoded)
            else:
                self.inside[future] = encoded
                shapes.setdefault(self.scheduler.walker.shape_of(encoded), []).append(future)
        for shape, members in shapes.items():
            lengths = [self.scheduler.walker.length(self.inside[future]) for future in members]
            groups = self.groups.setdefault(shape, deque())
            for places in batch_places(lengths, self.scheduler.max_batch_tokens):
                groups.append([members[place] for place in places])
            if shape not in self.courses:
                self.courses[shape] = self._course(shape)

    def _read(self, rows: list[Any]) -> list[Any]:
        """What the model reads of rows; an error in the place of those that cannot be read."""
        try:
            encoded: list[Any] = self.reader.encode(rows)
        except Exception as error:
            if len(rows) == 1:
                return [error if isinstance(error, EarlyExitError) else _failed("It cannot be read", error)]
            return [self._read([row])[0] for row in rows]
        if len(rows) > 1:  # an error tells the number of its row: of one row, 0
            encoded = [
                self._read([row])[0] if isinstance(one, EarlyExitError) else one
                for row, one in zip(rows, encoded, strict=True)
            ]
        return [self._checked(one) for one in encoded]

    def _checked(self, encoded: Any) -> Any:
        """The same, or what keeps the model from reading it."""
        if isinstance(encoded, BaseException):
            return encoded
        try:
            return self.scheduler.walker.check(encoded, 0) or encoded
        except Exception as error:
            return _failed("It cannot be checked", error)

    def _course(self, shape: Hashable) -> Course:
        arriving = partial(self._arriving, shape)
        return Course(self.scheduler, arriving, self._let_go, self.max_wait, self._off, self._broken, self._shadow())

    def _shadow(self) -> Shadow | None:
        if self.monitor is None:
            return None
        return Shadow(self.scheduler, self._is_shadowed, partial(self._record, ()), broken=_nobody_waits)

    def _is_shadowed(self, future: RowFuture) -> bool:
        return self.monitor is not None and not future.cancelled() and bool(self.monitor.draw(1))

    def _arriving(self, shape: Hashable) -> Chunk | None:
        """A chunk of new rows of a shape, if there are any."""
        if not self.groups.get(shape):
            self._admit()
        groups = self.groups.get(shape)
        while groups:
            group = groups.popleft()
            try:
                if self._answered_alone(group):
                    continue
                return self.scheduler.begin([(future, self.inside[future]) for future in group])
            except Exception as error:
                if len(group) == 1:
                    self._broken(group, error)
                else:
                    groups.extendleft([future] for future in reversed(group))
        return None

    def _answered_alone(self, group: Sequence[RowFuture]) -> bool:
        """Whether a row that nobody can share a batch with has been answered, by a quicker way for such."""
        if len(self.inside) > 1 or self.queue or self.monitor is not None:
            return False
        row = self.inside[group[0]]
        leaving = self.scheduler.alone(group[0], row)
        if leaving is None:
            return False
        self.batches, self.batch_tokens = self.batches + 1, self.batch_tokens + self.scheduler.walker.length(row)
        self._let_go(leaving)
        return True

    # --- out --------------------------------------------------------------------------------------------------------

    def _off(self, futures: Sequence[RowFuture]) -> list[str | None]:
        now = time.monotonic()
        return [
            CANCELLED if future.called_off else DEADLINE if future.ends_at <= now else None for future in futures
        ]  # fmt: skip

    def _let_go(self, leaving: Leaving) -> None:
        """Hand answers over; nobody waits for those who have none."""
        logits, scores = leaving.answer.float().cpu(), leaving.score.float().tolist()
        finite, index = logits.isfinite().all(1).tolist(), leaving.exit_index
        layer = self.scheduler.walker.exit_layers[index] if index >= 0 else 0
        seen = 0
        for row, (future, reason) in enumerate(zip(leaving.places, leaving.reasons, strict=True)):
            if reason == CANCELLED:
                future.finish()
                self.inside.pop(future, None)
            elif not finite[row] and index >= 0:
                self._fail(future, not_finite(0))
            else:
                answer = Answer(logits[row].clone(), layer, scores[row], reason, None)
                seen += future.finish(answer, count=self._count_answer) and index >= 0
                self.inside.pop(future, None)
        if seen:
            self._record([layer] * seen)

    def _record(self, layers: Sequence[int], same: Sequence[bool] = ()) -> None:
        """Tell the monitor; rows go on whatever becomes of that, such as in a function of its owner's."""
        if self.monitor is not None:
            try:
                self.monitor.record(layers, same)
            except Exception as error:
                logger.error("The monitor, or what it calls at an alarm, failed with %s.", type(error).__name__)

    def _broken(self, futures: Sequence[RowFuture], error: Exception) -> None:
        for future in futures:
            self._fail(future, _failed("Its layers failed", error))

    def _fail(self, future: RowFuture, error: BaseException) -> None:
        future.finish(error=error, count=self._count_failure)
        self.inside.pop(future, None)

    def _count_answer(self) -> None:
        self.num_answered += 1

    def _count_failure(self) -> None:
        self.failed += 1


def _nobody_waits(futures: Sequence[Any], error: Exception) -> None:
    """The rows were answered; they are only not compared."""
    logger.warning("%d rows of a monitor's shadow failed: %s", len(futures), error)


def _failed(what: str, error: Exception) -> EarlyExitError:
    """An error of ours around another, without the frames that would keep tensors alive."""
    ours = EarlyExitError(f"The row has no answer. {what}: {type(error).__name__}: {error}", field=ENGINE)
    ours.__cause__ = error.with_traceback(None)
    return ours
