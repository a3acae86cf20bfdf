"""A server as a process: it finishes what it accepted, loads its folder anew, and has a page that fits a phone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

import hf_earlyexit as ee

SECONDS = 150


@pytest.fixture(scope="module")
def folder(tiny_model, open_policy, tokenizer, tmp_path_factory):
    model = tiny_model(id2label={0: "bad", 1: "so-so", 2: "good"})
    model.set_exit_policy(open_policy(model, "entropy"))
    folder = tmp_path_factory.mktemp("served") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def server(folder):
    """The address of a server of that folder, and its process."""
    command = [sys.executable, "-m", "hf_earlyexit.cli.main", "serve", str(folder), "--port", "0", "--device", "cpu"]
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
    assert address.wait(SECONDS)
    (found,) = re.findall(r"http://\S+", "".join(lines)) or [pytest.fail("".join(lines))]
    yield found, process, lines
    if process.poll() is None:
        process.kill()
    process.wait(SECONDS)
    reader.join(SECONDS)
    process.stderr.close()


def ask(address, text="w5 w6"):
    body = json.dumps({"inputs": [text] * 8}).encode()
    request = urllib.request.Request(f"{address}/v1/classify", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


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

    with ThreadPoolExecutor(6) as pool:
        connected = [pool.submit(ask, address) for _ in range(6)]
        while not any(one.done() for one in connected):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        done = [one for one in connected if one.exception(SECONDS) is None]
    assert process.wait(SECONDS) == 0
    assert done
    assert all(len(one.result()) == 8 for one in done)
    assert not re.search(r"w[5-9]|Traceback", "".join(lines))


def test_the_page_fits_a_phone_and_answers(server, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed, which shows the page")
    address, _, _ = server
    usual = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=375,800"]
    page = subprocess.run(
        [*usual, "--virtual-time-budget=20000", "--dump-dom", f"{address}/#w5%20w6"],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    (answer,) = re.findall(r"<output[^>]*>([^<]*)", page.stdout)
    expected = ask(address)[0]
    assert answer.startswith(
        f"{expected['label']} ({expected['score']:.3f}). Left after layer {expected['exit_layer']} of 4: "
    )
    taken = subprocess.run(
        [*usual, f"--screenshot={tmp_path / 'page.png'}", f"{address}/"],
        capture_output=True,
        timeout=SECONDS,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert taken.returncode == 0
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.width == 375
        right = picture.convert("L").crop((361, 0, 375, picture.height))  # what is too wide runs into the margin
        assert len(right.getcolors()) == 1
