"""Several processes that serve one address: watched over, started anew when they die, exchanged one by one on SIGHUP."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import wait
from typing import Any

import torch
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from ..errors import EarlyExitError
from .connections import listening
from .metrics import FOLDER_OF_ALL
from .run import Serving, announce

PATIENCE = 120  # seconds that a worker may take to load, or to answer that it lives
PAUSE = 5.0  # seconds before a worker that could not start is tried again
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

logger = logging.getLogger(__name__)


def serve_in_workers(make: Callable[[], Serving], host: str, port: int, workers: int, max_seconds: float) -> None:
    """Listen with several processes until SIGTERM or SIGINT; requests that were accepted are answered.

    Each loads the model for itself and computes with one thread. One that dies is started anew. SIGHUP starts new ones that
    load the model again, one by one, and each takes over from a former one once it answers; where the model cannot be
    loaded, the former ones serve on.

    Args:
        make: gives what is served, in the process that serves it; can be pickled.
        host, port: where.
        workers: how many processes.
        max_seconds: that a client may hang between requests.

    Raises:
        EarlyExitError: if they cannot start.
    """
    for name in ONE_THREAD:
        os.environ[name] = "1"  # of the processes to come
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(prefix="hf_earlyexit-") as folder:
        os.environ[FOLDER_OF_ALL] = folder
        app: Any = partial(_application, make)
        options = {"workers": workers, "timeout_worker_healthcheck": PATIENCE, **listening(max_seconds)}
        config = uvicorn.Config(app, factory=True, host=host, port=port, **options)
        try:
            socket = config.bind_socket()
            try:
                Workers(config, [socket], folder).run()
            finally:
                socket.close()
        finally:
            del os.environ[FOLDER_OF_ALL]


class Workers(Multiprocess):
    """uvicorn's, which waits for its first processes, and does not give up on later ones that cannot start.

    Args:
        config, sockets: as uvicorn's.
        folder: of the counts of all.
    """

    def __init__(self, config: uvicorn.Config, sockets: list[Any], folder: str) -> None:
        super().__init__(config, sockets)
        self.folder = folder
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.should_exit.set())  # uvicorn's waits until an exchange is over
        self.again_at: dict[int, float] = {}

    def init_processes(self) -> None:
        """Start them, and tell where they listen once all do."""
        super().init_processes()
        for process in self.processes:
            while not process.wait_until_ready(1, self.should_exit) and process.process.is_alive():
                if self.should_exit.is_set():
                    return
            if not process.process.is_alive():
                self.terminate_all()
                self.join_all()
                raise EarlyExitError("The workers could not start; what one of them said stands above.", field="workers")
        announce(self.sockets[0].getsockname())

    def keep_subprocess_alive(self) -> None:
        """Start anew those that died; one that cannot start is tried again later, while the others serve."""
        for place, process in enumerate(self.processes):
            if self.should_exit.is_set() or time.monotonic() < self.again_at.get(place, 0):
                continue
            if process.is_alive(timeout=PATIENCE):
                continue
            process.kill()
            process.join()
            mark_process_dead(process.pid, self.folder)  # type: ignore[no-untyped-call]
            if process.exitcode == STARTUP_FAILURE and place not in self.again_at:
                logger.error("A worker could not start; it is tried again in %g seconds.", PAUSE)
                self.again_at[place] = time.monotonic() + PAUSE
                continue
            logger.error("A worker died (exit code %s) and is started anew.", process.exitcode)
            self.again_at.pop(place, None)
            self.processes[place] = Process(self.config, self.sockets)
            self.processes[place].start()

    def restart_all(self) -> None:
        """Exchange each for a new one, which loads the model anew."""
        former = {process.pid for process in self.processes}
        super().restart_all()
        for pid in former - {process.pid for process in self.processes}:
            mark_process_dead(pid, self.folder)  # type: ignore[no-untyped-call]

    def handle_ttin(self) -> None:
        """Their number stays."""

    def handle_ttou(self) -> None:
        """Their number stays."""


def _application(make: Callable[[], Serving]) -> Any:
    """What a worker serves; in its process."""
    torch.set_num_threads(1)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # a terminal tells it to all; the parent exchanges workers
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    try:
        return make().app
    except EarlyExitError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(STARTUP_FAILURE)
    except Exception:
        logger.exception("A worker could not start.")
        sys.exit(STARTUP_FAILURE)


def _stop_with_parent() -> None:
    """Stop as on SIGTERM once the parent is gone."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
