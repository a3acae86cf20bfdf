"""Clients that hang: uvicorn by itself waits for ever for a request to begin, and for an answer to be read."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

LONGEST_HEAD = 65_536  # bytes
QUIET: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False, "ws": "none"}
WORDS = b'{"error":"The head of a request is too long.","error_type":"validation"}'
TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(WORDS), WORDS)
)


class Connection(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """uvicorn's; closed if for some time nothing is asked for, or nothing read of what is answered. Answers that are being
    made are waited for: how long that may take is up to the application.

    Args:
        seconds: that a client may hang; it has between once and twice as long.
        given: as for uvicorn's.
    """

    def __init__(self, *given: Any, seconds: float, **more: Any) -> None:
        super().__init__(*given, **more)
        self.seconds, self.head = seconds, 0

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._look_later()

    def connection_lost(self, error: Exception | None) -> None:
        self.look.cancel()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        before = self.headers
        super().data_received(data)
        in_head = self.cycle is None or self.cycle.scope is not self.scope
        self.head = self.head + len(data) if in_head and self.headers is before else 0
        if self.head > LONGEST_HEAD and not self.transport.is_closing():  # h11 has a limit of its own
            self.transport.write(TOO_LONG)
            self.transport.close()

    def _look_later(self) -> None:
        self.seen = self._state()
        self.look = asyncio.get_running_loop().call_later(self.seconds, self._look)

    def _state(self) -> tuple[Any, int]:
        """The last request, and how much of its answer has not been read."""
        return self.cycle, self.transport.get_write_buffer_size()

    def _look(self) -> None:
        waits = self.cycle is None or self.cycle.response_complete or self.flow.write_paused
        if waits and self._state() == self.seen:
            self.transport.abort()
        else:
            self._look_later()


def listening(seconds: float) -> dict[str, Any]:
    """Options of uvicorn: what it tells, and how long clients may hang.

    Args:
        seconds: as for `Connection`.
    """
    return {**QUIET, "http": partial(Connection, seconds=seconds)}
