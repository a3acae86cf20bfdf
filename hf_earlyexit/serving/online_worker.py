"""The thread behind an online engine: it sleeps while there is nothing to do, and is started anew if it dies."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import EarlyExitError, UsageError
from .monitor import Monitor
from .online_rows import ENGINE, Line, RowFuture
from .reader import RowReader
from .scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineState:
    """What an engine has done so far, and what it has to do.

    Attributes:
        queued: rows that wait to be let in; running: rows under way.
        answered, failed, refused: rows with an answer, with an error, and sent away because the queue was full.
        batches: that ran from one exit to the next; batch_tokens: in all of them, padding included; batch_fill: mean share
            of a full batch, nan before the first.
        restarts: times that the worker was started anew.
    """

    queued: int
    running: int
    answered: int
    failed: int
    refused: int
    batches: int
    batch_tokens: int
    batch_fill: float
    restarts: int


class Worker:
    """Runs the lines of an engine, one step each in turn.

    Args:
        max_queue: most rows that wait to be let in.
        max_wait: as for `Line`.
    """

    def __init__(self, max_queue: int, max_wait: float | None) -> None:
        self.max_queue, self.max_wait = max_queue, max_wait
        self.lock = threading.Condition(threading.RLock())
        self.lines: dict[Scheduler, Line] = {}  # those with work
        self.tally = Counter[str]()
        self.queued = 0
        self.closed = self.drops = False
        self.thread: threading.Thread | None = None
        self.process: int | None = None

    @property
    def of_another_process(self) -> bool:
        """Whether this process was forked from the one whose thread runs the lines."""
        return self.process not in (None, os.getpid())

    def put(
        self,
        scheduler: Scheduler,
        reader: RowReader,
        future: RowFuture,
        monitor: Monitor | None,
    ) -> None:
        """Add a row to the line of a scheduler.

        Args:
            scheduler: of its model and operating point.
            reader: of its row.
            future: for its answer.
            monitor: as for `Line`.

        Raises:
            UsageError: with the field "engine" if the engine is closed, or was started before this process was forked; with
                the field "max_queue" if the queue is full.
        """
        if self.of_another_process:  # before the lock, which another thread may have held at the fork
            raise UsageError(
                f"This engine runs in process {self.process}; a process forked from it has no worker. Make the engine, or "
                "use it for the first time, after the fork: with gunicorn, in post_fork or without preloading.",
                field=ENGINE,
            )
        with self.lock:
            if self.closed:
                raise UsageError("The engine is closed; make another.", field=ENGINE)
            if self.queued >= self.max_queue:
                self.tally["refused"] += 1
                raise UsageError(
                    f"{self.queued} rows wait already, as many as max_queue allows; try again later.",
                    field="max_queue",
                    value=self.max_queue,
                )
            line = self.lines.get(scheduler)
            if line is None:
                line = self.lines[scheduler] = Line(scheduler, reader, self.lock, self.max_wait, monitor)
            self.queued, future.queued, future.leave_queue = self.queued + 1, True, self._leave_queue
            line.put(future)
            if len(line.queue) > 2 * self.max_queue + 16:
                line.forget_called_off()
            if self.thread is None:
                self._start()
            self.lock.notify()

    def close(self, drain: bool = True) -> None:
        """Take no more rows, and wait until those that were taken are answered or, not drained, have failed."""
        if self.of_another_process:
            return
        with self.lock:
            self.closed, self.drops = True, self.drops or not drain
            thread = self.thread
            self.lock.notify()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def state(self) -> EngineState:
        """Counts of this moment."""
        with self.lock:
            tally = self.tally + sum((_counts(line) for line in self.lines.values()), Counter())
            room = tally.pop("room", 0)
            return EngineState(
                queued=self.queued,
                running=sum(len(line.inside) for line in self.lines.values()),
                batch_fill=tally["batch_tokens"] / room if room else math.nan,
                **{name: tally[name] for name in ("answered", "failed", "refused", "batches", "batch_tokens", "restarts")},
            )

    def _leave_queue(self, future: RowFuture) -> None:
        with self.lock:
            self.queued, future.queued = self.queued - future.queued, False

    def _start(self) -> None:
        self.process = os.getpid()
        self.thread = threading.Thread(target=self._run, name="hf_earlyexit engine", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while lines := self._lines_with_work():
                    while lines:  # none is held while the thread waits: it would keep a model that has been replaced
                        lines.pop(0).step()
            if self.drops:
                self._fail_all(lambda: EarlyExitError("The engine was closed before the row was answered.", field=ENGINE))
        except BaseException as error:
            self._die(error)

    def _lines_with_work(self) -> list[Line]:
        """Waits for some; none once the engine is closed and has nothing left to do, or drops it."""
        with self.lock:
            self._forget_idle()
            while not self.lines and not self.closed:
                self.lock.wait()
            return [] if self.drops else list(self.lines.values())

    def _forget_idle(self) -> None:
        """Keep the counts of lines without work, and nothing else of them; the caller holds the lock."""
        for scheduler in [scheduler for scheduler, line in self.lines.items() if not line.busy]:
            self.tally += _counts(self.lines.pop(scheduler))

    def _die(self, error: BaseException) -> None:
        """Fail all rows; the next row starts another thread."""
        kind, cause = type(error).__name__, error.with_traceback(None)
        logger.error("The engine's worker died of %s; its rows fail, and it is started anew.", kind)

        def died() -> EarlyExitError:
            words = f"The engine's worker died of {kind}: {cause}. It is started anew; send the row again."
            ours = EarlyExitError(words, field=ENGINE)
            ours.__cause__ = cause
            return ours

        with self.lock:
            self.tally["restarts"] += 1
        self._fail_all(died)

    def _fail_all(self, error: Callable[[], BaseException]) -> None:
        with self.lock:
            lines, self.lines, self.thread = list(self.lines.values()), {}, None
        for line in lines:
            line.fail_all(error)
            with self.lock:
                self.tally += _counts(line)


def _counts(line: Line) -> Counter[str]:
    room = line.batches * line.scheduler.max_batch_tokens
    counts = {"failed": line.failed, "batches": line.batches, "batch_tokens": line.batch_tokens, "room": room}
    return Counter({"answered": line.num_answered, **counts})
