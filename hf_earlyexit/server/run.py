"""From the command line to a server that listens: load, serve, load anew on SIGHUP, and stop once all is answered."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from ..serving.online import Engine
from .app import make_app, replace_parts
from .connections import listening
from .kept_monitor import KeptMonitor

logger = logging.getLogger(__name__)


class Serving:
    """A folder that is served, and may be loaded anew.

    Args:
        load: gives the model and what reads its rows, by name: tokenizer or image_processor.
        engine: further arguments of `Engine`.
        watch: of `KeptMonitor`, beside the model; none watches without.
        app: further arguments of `make_app`.
    """

    def __init__(
        self,
        load: Callable[[], tuple[Any, dict[str, Any]]],
        engine: dict[str, Any],
        watch: dict[str, Any] | None,
        app: dict[str, Any],
    ) -> None:
        self.load, self.one_at_a_time = load, threading.Lock()
        model, parts = load()
        self.monitor = None if watch is None else KeptMonitor(model, **watch)
        self.engine = Engine(model, monitor=self.monitor, **engine, **parts)
        self.app = make_app(self.engine, parts=parts, monitor=self.monitor, on_stop=self.close, **app)

    def reload(self) -> bool:
        """Load the folder anew; what cannot be loaded leaves the former model. Whether it is another now."""
        with self.one_at_a_time:  # else who began first could end last, with what was there before
            try:
                model, parts = self.load()
                self.engine.replace(model, **parts)
            except Exception as error:  # whatever is wrong with the folder, what serves goes on
                words = "The model cannot be loaded anew, and the former one serves on. %s: %s"
                logger.error(words, type(error).__name__, error)
                return False
            replace_parts(self.app, parts)
            logger.warning("The model has been loaded anew.")
            return True

    def close(self) -> None:
        """Answer what was taken, and keep what the monitor saw."""
        self.engine.close()
        if self.monitor is not None:
            self.monitor.close()


def serve(serving: Serving, host: str, port: int, max_seconds: float) -> None:
    """Listen until SIGTERM or SIGINT; requests that were accepted are answered.

    Args:
        serving: what is served.
        host, port: where.
        max_seconds: that a client may hang between requests.
    """
    server = _Announcing(uvicorn.Config(serving.app, host=host, port=port, **listening(max_seconds)))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises it once more when all is answered
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=serving.reload, daemon=True).start())
    server.run()


def announce(address: tuple[Any, ...]) -> None:
    """Tell where the server listens."""
    host, port = address[:2]
    print(f"listening at http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)


class _Announcing(uvicorn.Server):
    """Tells where it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for socket in server.sockets:
                announce(socket.getsockname())
