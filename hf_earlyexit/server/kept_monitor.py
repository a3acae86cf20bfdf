"""A monitor whose counts are in a file, where those of several processes and of earlier runs come together."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from ..errors import EarlyExitError, UsageError
from ..modeling.protocol import ExitModel
from ..serving.monitor import Monitor

if sys.platform != "win32":
    import fcntl

EVERY = 2.0  # seconds between two looks into the file while rows come
logger = logging.getLogger(__name__)


class KeptMonitor(Monitor):
    """A `Monitor` for engines of one or several processes: each draws rows for itself, and the file judges all of them.

    What is recorded waits in memory for a moment, and is then recorded in the file's monitor, which is the only one that
    raises alarms; so bounds and alarms are those of one monitor that saw every row. `state` is the file's as last seen.

    Args:
        model: with exits, whose certificate tells limit and reference where it has one.
        path: the file, as `Monitor.save` writes it; gone on with where it is there.
        limit, shadow, fall_back, operating_point: as for `Monitor`. Limit, window and the like are the file's where it is
            there; another limit than its own is refused.
        every: seconds between two looks into the file.

    Raises:
        CheckpointError: for a file that is no monitor's.
        UsageError: for a file of a model with other exits, or with another limit than the one given.
    """

    def __init__(
        self,
        model: ExitModel,
        path: str | PathLike[str],
        *,
        limit: float | None = None,
        shadow: float = 0.01,
        fall_back: bool = False,
        operating_point: str | None = None,
        every: float = EVERY,
    ) -> None:
        self.path, self.every = Path(path), every
        super().__init__(
            model, limit=limit, shadow=shadow, fall_back=fall_back, operating_point=operating_point, seed=os.getpid()
        )
        self._given_limit = limit
        self._waiting: list[tuple[list[int], list[bool]]] = []
        self._something = threading.Condition()
        self._closed = threading.Event()
        self.sync()
        self._thread = threading.Thread(target=self._keep_on, name="hf_earlyexit monitor", daemon=True)
        self._thread.start()

    def record(self, exit_layers: Sequence[int], same: Sequence[bool] = ()) -> None:
        """As of `Monitor`; alarms come with the next look into the file."""
        if unknown := set(exit_layers) - set(self.exit_layers):
            raise UsageError(f"A row left after layer {min(unknown)}, where there is no exit.", field="exit_layers")
        with self._something:
            self._waiting.append((list(exit_layers), list(same)))
            self._something.notify()

    def sync(self) -> None:
        """Record in the file what waits, and see what others have recorded there."""
        with self._something:
            waiting, self._waiting = self._waiting, []
        try:
            with _locked(self.path):
                joint = self._joint()
                joint.record(
                    [layer for layers, _ in waiting for layer in layers], [one for _, same in waiting for one in same]
                )
                joint.save(self.path)
        except BaseException:
            with self._something:
                self._waiting = [*waiting, *self._waiting]
            raise
        self.state, self.limit, self.reference = joint.state, joint.limit, joint.reference

    def close(self) -> None:
        """Record what waits, and look no more."""
        self._closed.set()
        with self._something:
            self._something.notify()
        self._thread.join()
        self.sync()

    def _joint(self) -> Monitor:
        """The file's monitor, or one that begins it."""
        if not self.path.exists():
            options = {name: getattr(self, name) for name in ("limit", "confidence", "reference", "window")}
            return Monitor(self.exit_layers, shadow=self.shadow, fall_back=self.fall_back, **options)
        joint = Monitor.load(self.path)
        if joint.exit_layers != self.exit_layers:
            raise UsageError(
                f"{self.path} is of a model with exits behind {joint.exit_layers}, and this one has them behind "
                f"{self.exit_layers}; name another file.",
                field="monitor",
                path=self.path,
            )
        if self._given_limit is not None and joint.limit != self._given_limit:
            raise UsageError(
                f"{self.path} keeps counts and alarms of the limit {joint.limit:g}, and limit is {self._given_limit:g}. "
                "Name another file, or leave the limit out to go on.",
                field="limit",
                value=self._given_limit,
                path=self.path,
            )
        joint.shadow, joint.fall_back = self.shadow, self.fall_back
        return joint

    def _keep_on(self) -> None:
        while not self._closed.wait(self.every):  # idle, it sleeps until something comes
            with self._something:
                while not self._waiting and not self._closed.is_set():
                    self._something.wait()
            if self._closed.is_set():
                return
            try:
                self.sync()
            except (EarlyExitError, OSError) as error:  # the rows wait for the next look
                logger.error("The monitor's counts could not be kept: %s", error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone with a file among processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "ab") as file:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
