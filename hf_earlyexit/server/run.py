"""From the command line to a server that listens: load, serve, load anew on SIGHUP, and stop once all is answered."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import uvicorn

from ..serving.online import Engine
from .app import make_app

logger = logging.getLogger(__name__)


class Serving:
    """A folder that is served, and may be loaded anew.

    Args:
        load: gives the model and what reads its rows, by name: tokenizer or image_processor.
        max_queue, max_batch_tokens: as for `Engine`.
        options: for `make_app`.
    """

    def __init__(
        self, load: Callable[[], tuple[Any, dict[str, Any]]], max_queue: int, max_batch_tokens: int | None, **options: Any
    ) -> None:
        self.load = load
        model, parts = load()
        self.engine = Engine(model, max_queue=max_queue, max_batch_tokens=max_batch_tokens, **parts)
        self.app = make_app(self.engine, tokenizer=parts.get("tokenizer"), **options)

    def reload(self) -> bool:
        """Load the folder anew; what cannot be loaded leaves the former model. Whether it is another now."""
        try:
            model, parts = self.load()
            self.engine.replace(model, **parts)
        except Exception as error:  # whatever is wrong with the folder, what serves goes on
            logger.error("The model cannot be loaded anew (%s); the former one serves on.", type(error).__name__)
            return False
        self.app.state.tokenizer = deepcopy(parts.get("tokenizer"))
        logger.warning("The model has been loaded anew.")
        return True


def serve(serving: Serving, host: str, port: int) -> None:
    """Listen until SIGTERM or SIGINT; requests that were accepted are answered.

    Args:
        serving: what is served.
        host, port: where.
    """
    config = uvicorn.Config(serving.app, host=host, port=port, access_log=False, log_level="warning", server_header=False)
    server = _Announcing(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises it once more when all is answered
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=serving.reload, daemon=True).start())
    try:
        server.run()
    finally:
        serving.engine.close()


class _Announcing(uvicorn.Server):
    """Tells where it listens."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        for listening in self.servers:
            for socket in listening.sockets:
                host, port = socket.getsockname()[:2]
                print(f"listening at http://{host}:{port}", file=sys.stderr, flush=True)
