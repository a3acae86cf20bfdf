"""A server as a process: it finishes what it accepted, loads its folder anew, and has a page that fits a phone."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import psutil
import pytest
from PIL import Image

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.server.run import Serving

SECONDS = 150
PATIENCE = 6  # of the server, with one request


@pytest.fixture(scope="module")
def new_folder(tiny_model, open_policy, tokenizer, tmp_path_factory):
    """`new_folder()`: a folder with a model that has a policy, and its tokenizer."""
    model = tiny_model(id2label={0: "bad", 1: "so-so", 2: "good"})
    model.set_exit_policy(open_policy(model, "entropy"))

    def make():
        folder = tmp_path_factory.mktemp("served") / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def folder(new_folder):
    return new_folder()


@contextmanager
def serving(folder, *flags):
    """The address of a server of that folder, its process, and what it has written."""
    command = [sys.executable, "-m", "hf_earlyexit.cli.main", "serve", str(folder), "--port", "0", "--device", "cpu", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines, address = [], threading.Event()

    def read():
        for line in process.stderr:
            lines.append(line)
            if "listening at" in line:
                address.set()
        address.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert address.wait(SECONDS)
        (found,) = re.findall(r"http://\S+", "".join(lines)) or [pytest.fail("".join(lines))]
        yield found, process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(SECONDS)
        reader.join(SECONDS)
        process.stderr.close()


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, "--max_seconds", str(PATIENCE)) as running:
        yield running


def ask(address, text="w5 w6", rows=8, **more):
    body = json.dumps({"inputs": [text] * rows, **more}).encode()
    request = urllib.request.Request(f"{address}/v1/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


def test_pages_fit_a_phone_and_a_screen_and_tell_what_exits_say(server, chromium, tmp_path):
    address, _, _ = server
    (expected,) = ask(address, "w5 w6", rows=1, exits=True)
    page = chromium(tmp_path, 375, "--dump-dom", f"{address}/#w5%20w6")
    (answer,) = re.findall(r"<output[^>]*>([^<]*)", page)
    score = f"({expected['score']:.3f})"
    assert answer.startswith(f"{expected['label']} {score}. Left after layer {expected['exit_layer']} of 4: ")
    cells = [re.findall(r"<td[^>]*>([^<]*)", row) for row in re.findall(r"<tr class=.*?</tr>", page)][1:]
    assert [[cell[0], cell[1], cell[4]] for cell in cells] == [
        [str(exit["layer"]), exit["prediction"], exit["verdict"]] for exit in expected["exits"]
    ]
    (left,) = re.findall(r'<tr class="left"><td[^>]*>(\d)', page)
    assert int(left) == expected["exit_layer"]
    for width, path in ((375, "/#w5%20w6"), (1280, "/#w5%20w6"), (375, "/docs")):
        chromium(tmp_path, width, f"--screenshot={tmp_path / 'page.png'}", f"{address}{path}")
        with Image.open(tmp_path / "page.png") as picture:
            assert picture.width == width
            right = picture.convert("L").crop((width - 14, 0, width, picture.height))  # where what is too wide runs
            assert len(right.getcolors()) == 1, (width, path)


BODY = json.dumps({"inputs": ["w5 w6"]}).encode()
HEAD = (
    "POST /v1/classify HTTP/1.1\r\nHost: l\r\nConnection: close\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()


def hanging(address, sent):
    """A client that has sent so much of its request and sends no more."""
    host, port = address.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=SECONDS)
    client.sendall(sent)
    return client


def test_clients_that_hang_hold_nobody_up(server):
    address = server[0]
    (expected,) = ask(address, rows=1)
    with ExitStack() as stack:
        sent = [b"", HEAD[:9], HEAD[:-2], HEAD, HEAD + BODY[:-1], HEAD + BODY]  # the last does not read its answer
        clients = [stack.enter_context(hanging(address, part)) for part in sent * 20]
        start = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: ask(address, rows=1)[0], range(20)))
        assert time.monotonic() - start < PATIENCE  # before the server gives any of them up
        clients[4].sendall(BODY[-1:])
        head, _, body = b"".join(iter(lambda: clients[4].recv(4096), b"")).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
    for answer in (*answers, *json.loads(body)):
        assert (answer["label"], answer["exit_layer"]) == (expected["label"], expected["exit_layer"])


def request(*headers, line="POST /v1/classify HTTP/1.1", body=BODY):
    return "\r\n".join([line, "Host: l", "Connection: close", *headers, "", ""]).encode() + body


JSON, LENGTH, CHUNKED = "Content-Type: application/json", f"Content-Length: {len(BODY)}", "Transfer-Encoding: chunked"
STRANGE = [  # statuses that answers may have; 4xx are in words
    ({200}, request(JSON, LENGTH, line="POST /v1/classify HTTP/1.0")),
    ({200, 400}, request(JSON, LENGTH).replace(b"Host: l\r\n", b"")),
    ({200}, request(JSON, LENGTH, "Expect: 100-continue")),
    ({200, 404}, request(JSON, LENGTH, line="POST http://evil.example/v1/classify HTTP/1.1")),
    ({411}, request(JSON, CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n")),
    ({400, 411}, request(JSON, CHUNKED, LENGTH)),
    ({400, 411}, request(JSON, "Transfer-Encoding: identity", LENGTH)),
    ({400}, request(JSON, LENGTH, "Content-Length: 5")),
    ({400}, request(JSON, "Content-Length: -5")),
    ({400, 413}, request(JSON, "Content-Length: " + "9" * 30)),
    ({411}, request(JSON)),
    ({415}, request(LENGTH)),
    ({400, 422}, request(JSON, LENGTH, "Content-Encoding: gzip", body=BODY[::-1])),
    ({404}, request(line="GET /../../etc/passwd HTTP/1.1", body=b"")),
    ({404}, request(line="GET /v1/%00%ff HTTP/1.1", body=b"")),
    ({404, 405}, request(line="OPTIONS * HTTP/1.1", body=b"")),
    ({405}, request(JSON, LENGTH, line="PUT /v1/classify HTTP/1.1")),
    ({400, 404, 405}, request(line="CONNECT evil.example:80 HTTP/1.1", body=b"")),
    ({200, 307, 400, 404}, request(JSON, LENGTH, line="POST /predict/ HTTP/1.1").replace(b"Host: l", b"Host: [")),
    ({400, 431}, request(*(f"X-{number}: a" for number in range(20_000)), line="GET / HTTP/1.1", body=b"")),
    ({200}, request("Upgrade: websocket", line="GET / HTTP/1.1", body=b"").replace(b"close", b"Upgrade, close")),
    (
        {200, 400, 408, 422},
        request(JSON, LENGTH, "Upgrade: websocket", "Sec-WebSocket-Key: x").replace(b"close", b"Upgrade, close"),
    ),
    ({400}, b"\x16\x03\x01\x00\xa5\xff\xfe"),
]


def statuses(address, sent):
    """Of all answers on one connection, and the last one's body."""
    with hanging(address, sent) as client:
        try:
            got = b"".join(iter(lambda: client.recv(1 << 16), b""))
        except ConnectionResetError:  # it is let go before all that it has sent is read
            return [431], b"error"
    heads = re.findall(rb"HTTP/1.1 (\d+) ", got)
    return [int(status) for status in heads if status != b"100"], got.rpartition(b"\r\n\r\n")[2]


def test_strange_requests_are_answered_and_harm_nobody(server):
    address, _, lines = server
    for expected, sent in STRANGE:
        got, body = statuses(address, sent)
        assert len(got) == 1, sent
        assert got[0] in expected, sent
        assert got[0] < 400 or b"error" in body or b"Invalid HTTP" in body
    piped = request(JSON, LENGTH).replace(b"Connection: close", b"X: y") * 30
    assert statuses(address, piped + request(JSON, LENGTH))[0] == [200] * 31
    assert len(ask(address, rows=8)) == 8
    assert "Traceback" not in "".join(lines)


def test_it_listens_on_loopback_loads_anew_under_load_and_finishes_what_it_accepted(server, folder, tiny_model, tokenizer):
    address, process, lines = server
    assert address.startswith("http://127.0.0.1:")
    assert ask(address)[0]["label"] in ("bad", "so-so", "good")
    other = tiny_model(id2label={0: "x", 1: "y", 2: "z"})
    stop = threading.Event()

    def client():
        answers = []
        while not stop.is_set():
            answers.append(ask(address, "w7 w8 w9")[0]["label"])
        return answers

    hangs = hanging(address, HEAD + BODY[:-1])
    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(client) for _ in range(3)]
        try:
            ee.save(other, folder, tokenizer=tokenizer)
            process.send_signal(signal.SIGHUP)
            ends_at = time.monotonic() + SECONDS
            while ask(address)[0]["label"] not in ("x", "y", "z"):
                assert time.monotonic() < ends_at
        finally:
            stop.set()
        answers = [label for one in clients for label in one.result(SECONDS)]  # not one has failed
    assert set(answers) & {"bad", "so-so", "good"}

    with ThreadPoolExecutor(6) as pool, hangs:
        connected = [pool.submit(ask, address) for _ in range(6)]
        while not any(one.done() for one in connected):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        done = [one for one in connected if one.exception(SECONDS) is None]
        assert process.wait(SECONDS) == 0
    assert done
    assert all(len(one.result()) == 8 for one in done)
    assert not [one for one in connected if isinstance(one.exception(), urllib.error.HTTPError)]  # they were not let in
    assert not re.search(r"w[5-9]|Traceback", "".join(lines))


def test_a_folder_that_cannot_be_loaded_anew_is_told_with_the_reason_and_serves_on(new_folder, tokenizer, caplog):
    folder = new_folder()

    def load():
        return ee.from_pretrained(folder).eval(), {"tokenizer": tokenizer}

    serving = Serving(load, {}, None, {})
    try:
        answer = serving.engine.submit("w5 w6").result()
        (folder / "config.json").write_text("{")
        assert not serving.reload()
        assert "the former one serves on. CheckpointError: " in caplog.text
        assert "config.json" in caplog.text
        assert serving.engine.submit("w5 w6").result().exit_layer == answer.exit_layer
    finally:
        serving.close()


def test_who_loads_first_does_not_end_last(tiny_model, tokenizer):
    """Two SIGHUPs: the first reads what was there before it was written anew, and takes longer."""
    models, begun, opened = (
        [tiny_model(id2label={0: name, 1: "b", 2: "c"}) for name in "xyz"],
        threading.Event(),
        threading.Event(),
    )

    def load():
        model = models.pop(0)
        if len(models) == 1:
            begun.set()
            assert opened.wait(SECONDS)
        return model, {"tokenizer": tokenizer}

    serving = Serving(load, {}, None, {})
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(serving.reload)
            assert begun.wait(SECONDS)
            second = pool.submit(serving.reload)
            time.sleep(0.05)
            opened.set()
            assert first.result(SECONDS)
            assert second.result(SECONDS)
        assert serving.engine.models["default"].config.id2label[0] == "z"
    finally:
        serving.close()


def workers_of(process):
    """Processes that answer; a helper of multiprocessing's is none of them."""
    return {child.pid for child in psutil.Process(process.pid).children() if answers(child)}


def answers(child):
    try:
        return child.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(child.cmdline())
    except psutil.NoSuchProcess:  # it has ended since its parent was asked for its children
        return False


def metric(address, name):
    with urllib.request.urlopen(f"{address}/metrics", timeout=SECONDS) as response:
        return sum(float(line.split()[-1]) for line in response.read().decode().splitlines() if line.startswith(name))


@pytest.mark.slow
def test_workers_share_an_address_and_are_started_anew_and_exchanged_without_loss(
    new_folder, tiny_model, tokenizer, tmp_path
):
    folder, seen = new_folder(), tmp_path / "seen.json"
    with serving(folder, "--workers", "2", "--monitor", str(seen), "--shadow", "0.5") as (address, process, lines):
        first = workers_of(process)
        assert len(first) == 2
        for _ in range(20):
            ask(address)
        assert metric(address, "hf_earlyexit_engine_answered") >= 160  # of both, whoever is asked
        assert metric(address, 'hf_earlyexit_requests_total{path="/v1/classify",status="200"}') == 20
        os.kill(min(first), signal.SIGKILL)
        ends_at = time.monotonic() + SECONDS
        while len(second := workers_of(process)) < 2 or second == first:
            ask(address)  # the other answers
            assert time.monotonic() < ends_at
        ee.save(tiny_model(id2label={0: "p", 1: "q", 2: "r"}), folder, tokenizer=tokenizer)
        process.send_signal(signal.SIGHUP)
        while ask(address)[0]["label"] not in ("p", "q", "r"):
            assert time.monotonic() < ends_at
        assert metric(address, 'hf_earlyexit_requests_total{path="/v1/classify",status="200"}') > 20  # of the dead, too
        third = workers_of(process)
        with ThreadPoolExecutor(4) as pool:
            connected = [pool.submit(ask, address) for _ in range(4)]
            while not any(one.done() for one in connected):
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            assert process.wait(SECONDS) == 0
            assert all(len(one.result()) == 8 for one in connected if one.exception(SECONDS) is None)
        assert not re.search(r"w[5-9]|Traceback", "".join(lines))
    assert third - first
    assert not any(map(psutil.pid_exists, third))
    state = ee.Monitor.load(seen).state
    assert state.num_rows > 160
    assert 0.2 < state.num_shadowed / state.num_rows < 0.8


def test_a_model_that_cannot_be_served_ends_the_command_in_words(folder, capsys):
    image = "is a model for text-classification, not for image-classification"
    for flags, words in (
        (["--task", "image-classification"], image),
        (["--task", "captions"], "expected text-classification, image-classification, text-ranking"),
        (["--operating_point", "fats"], "fats"),
        (["--workers", "-1"], "workers is -1"),
        (["--max_tokens", "0"], "max_tokens is 0"),
        (["--monitor", str(folder / "config.json")], "no saved monitor"),
        (["--limit", "0.05"], "limit is that of a monitor"),
        (["--monitor", str(folder / "seen.json"), "--limit", "2"], "limit is 2.0"),
    ):
        assert main(["serve", str(folder), "--port", "0", *flags]) == 2
        assert words in capsys.readouterr().err
    command = [sys.executable, "-m", "hf_earlyexit.cli.main", "serve", str(folder), "--workers", "2"]
    done = subprocess.run([*command, "--task", "image-classification"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 2
    assert image in done.stderr
    assert "The workers could not start" in done.stderr
    assert "Traceback" not in done.stderr
