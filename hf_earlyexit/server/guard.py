"""What every request passes before a route sees it: its key, what and how much it sends, how long that takes; and counts."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Collection
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics
from .rows import Limits

OPEN = ("/", "/health", "/ready")  # without a key
KINDS = {401: "unauthorized", 429: "overloaded", 503: "backend"}


class Guard:
    """Refuses, reads bodies and counts, around an application. Plain ASGI, without the tasks that a middleware starts.

    Args:
        app: what it is around.
        api_key: that requests must bring, but those for `OPEN`.
        limits: of a body.
        metrics: counts.
        paths: of the routes; others are counted as one.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits, metrics: Metrics, paths: Collection[str]) -> None:
        self.app, self.api_key, self.limits, self.metrics, self.paths = app, api_key, limits, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, counted = time.perf_counter(), False
        path = scope["path"] if scope["path"] in self.paths else "other"  # whoever asks for many makes no many counters

        def count(status: int) -> None:
            nonlocal counted
            if not counted:
                counted = True
                self.metrics.count(path, status, time.perf_counter() - start)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"])  # before anything is sent: counts are never behind what clients know
            await send(message)

        try:
            answer: Response | bytes | None = self._refusal(scope)
            if answer is None and scope["method"] == "POST":  # only then is a body read
                answer = await self._body(receive)
            if isinstance(answer, Response):
                await answer(scope, receive, noted)
            else:
                await self.app(scope, receive if answer is None else _replay(answer, receive), noted)
        except Exception:
            count(500)
            raise

    def _refusal(self, scope: Scope) -> Response | None:
        """What is refused before any of the body is read."""
        headers = Headers(scope=scope)
        if self.api_key is not None and scope["path"] not in OPEN:
            brought = headers.get("authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(brought, f"Bearer {self.api_key}".encode()):
                return problem(401, "The request needs the header Authorization: Bearer KEY.")
        if scope["method"] != "POST":
            return None
        size = headers.get("content-length", "")
        if not size.isdecimal() or "transfer-encoding" in headers:  # which would let a body grow beyond it
            return problem(411, "The request needs the header Content-Length, and no Transfer-Encoding.")
        if not _is_json(headers.get("content-type", "")):
            return problem(415, "The request needs the header Content-Type: application/json, and a body of that kind.")
        if int(size[:20]) > self.limits.max_body:
            return problem(413, f"The body has {size[:20]} bytes; at most {self.limits.max_body} are taken.")
        return None

    async def _body(self, receive: Receive) -> Response | bytes:
        """Wait for the body, but not for ever: nor does a stopping server, then."""
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.limits.max_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return problem(400, "The client has gone.")
                    parts.append(message.get("body", b""))
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            words = f"The body was not all there within {self.limits.max_seconds:g} seconds."
            return problem(408, words, headers={"Connection": "close"})


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that has been read, then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def problem(status: int, message: str, kind: str | None = None, headers: Any = None) -> JSONResponse:
    """Why there is no answer, with its status."""
    headers = {**(headers or {}), **({"Retry-After": "1"} if status in (429, 503) else {})}
    return JSONResponse({"error": message, "error_type": kind or KINDS.get(status, "validation")}, status, headers)
