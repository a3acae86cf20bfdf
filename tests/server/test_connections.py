"""Clients that hang are let go, whichever parser is installed; those that are slow are not."""

import asyncio
import importlib
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol

from hf_earlyexit.server import connections

SECONDS = 60
BIG = 30_000_000  # bytes; more than a kernel keeps
SMALL = b"GET / HTTP/1.1\r\nHost: l\r\n\r\n"


class Server:
    """uvicorn in a thread; `look()` is all that happens when the time is up that clients may hang."""

    def __init__(self):
        self.opened, self.asked = threading.Event(), threading.Event()
        config = uvicorn.Config(
            self.app, port=0, interface="asgi3", lifespan="off", timeout_keep_alive=3600, **connections.listening(3600)
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    async def app(self, scope, receive, send):
        self.loop = asyncio.get_running_loop()
        self.asked.set()
        if scope["path"] == "/slow":
            await asyncio.to_thread(self.opened.wait, SECONDS)
        body = b"x" * (BIG if scope["path"] == "/big" else 1)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def look(self):
        async def look():
            for connection in list(self.server.server_state.connections):
                connection._look()
            return len(self.server.server_state.connections)

        return asyncio.run_coroutine_threadsafe(look(), self.loop).result(SECONDS)

    @contextmanager
    def client(self, *sent):
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as client:
            for part in sent:
                client.sendall(part)
            yield client


def read(client, size):
    got = 0
    while got < size and (part := client.recv(min(size - got, 1 << 20))):
        got += len(part)
    return got


@pytest.fixture(params=["as installed", "h11"])
def server(request, monkeypatch):
    with monkeypatch.context() as patch:
        if request.param == "h11":
            patch.setattr(auto, "AutoHTTPProtocol", H11Protocol)
        importlib.reload(connections)
        running = Server()
    with running.client(SMALL) as client:
        client.recv(1000)
    yield running
    running.opened.set()
    running.server.should_exit = running.server.force_exit = True
    running.thread.join(SECONDS)
    importlib.reload(connections)


@pytest.mark.parametrize("sent", [[], [b"GET / HT"], [SMALL[:-2]], [SMALL, b"GET"], [b"\r\n"]])
def test_who_asks_for_nothing_is_let_go(server, sent):
    with server.client(*sent) as client:
        client.settimeout(0.05)
        ends_at, gone = time.monotonic() + SECONDS, False
        while not gone:
            assert time.monotonic() < ends_at
            server.look()
            try:
                gone = not client.recv(1000)
            except TimeoutError:
                continue
            except ConnectionResetError:
                gone = True
    assert server.look() == 0


def test_who_asks_again_is_not(server):
    with server.client() as client:
        for _ in range(5):
            client.sendall(SMALL)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")
            assert server.look() == 1


def test_who_waits_for_an_answer_is_not(server):
    server.asked.clear()
    with server.client(SMALL.replace(b"/ ", b"/slow ")) as client:
        assert server.asked.wait(SECONDS)
        assert [server.look() for _ in range(5)] == [1] * 5
        server.opened.set()
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK")


@pytest.mark.parametrize("requests", [1, 3])
def test_who_reads_nothing_is_let_go_and_holds_no_server_that_stops(server, requests):
    server.asked.clear()
    with server.client(SMALL.replace(b"/ ", b"/big ") * requests) as client:
        assert server.asked.wait(SECONDS)
        assert read(client, 1000) == 1000
        server.server.should_exit = True
        while server.look():
            pass
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()


def test_who_reads_slowly_is_not(server):
    with server.client(SMALL.replace(b"/ ", b"/big ")) as client:
        got = read(client, BIG // 2)
        for _ in range(4):
            server.look()
            got += read(client, BIG // 10)
        assert got + read(client, BIG // 10 - 1000) > BIG - 2000


@pytest.mark.parametrize("line", [b"x: " + b"a" * 996 + b"\r\n", b"a" * 1000])
def test_no_head_is_endless(server, line):
    with server.client(SMALL, SMALL[:-2], b"x: ") as client:
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            client.sendall(line * 100_000)  # far more than the kernel takes
        assert server.look() == 0


def test_a_body_that_nobody_reads_is_no_head(server):
    body = b"y" * 1_000_000
    with server.client(SMALL[:-2], b"Content-Length: %d\r\n\r\n" % len(body), body, SMALL) as client:
        got = b""
        while got.count(b"200 OK") < 2:
            part = client.recv(1000)
            assert part
            got += part
