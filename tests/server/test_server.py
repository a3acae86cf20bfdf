"""Answers over HTTP: the shapes clients know, limits in words, and no 500 whatever comes."""

import asyncio
import base64
import copy
import io
import logging
import os
import re
import struct
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import schemathesis
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from PIL import EpsImagePlugin, Image
from pydantic import ValidationError
from transformers import BitImageProcessorPil, DeiTImageProcessorPil

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from hf_earlyexit.server import rows as rows_of_server
from hf_earlyexit.server.app import make_app
from hf_earlyexit.server.kept_monitor import KeptMonitor
from hf_earlyexit.server.metrics import Metrics
from hf_earlyexit.server.rows import Limits
from hf_earlyexit.server.shapes import ClassifyRequest, PredictRequest, RerankRequest
from hf_earlyexit.serving import online
from hf_earlyexit.serving.walker import ModelWalker
from tests.families.tiny import new_model

SECRET = "w42 w43 w44"


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model(id2label={0: "bad", 1: "so-so", 2: "good"})
    model.set_operating_points({"fast": open_policy(model, "entropy", share=0.7)}, default="fast")
    return model


@pytest.fixture(scope="module")
def make_client(tokenizer):
    """`make_client(model, engine options, **options of the app)`: a client that shows errors of ours as status 500."""
    made = []

    def make(model, engine_options=None, parts=None, **options):
        parts = parts or {"tokenizer": tokenizer}
        engine = ee.Engine(model, **parts, **(engine_options or {}))
        made.append(engine)
        client = TestClient(make_app(engine, parts=parts, **options), raise_server_exceptions=False)
        client.engine = engine
        return client

    yield make
    for engine in made:
        engine.close(drain=False)


@pytest.fixture(scope="module")
def client(make_client, model):
    return make_client(model, limits=Limits(max_rows=4, max_body=5000, max_characters=1000))


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    return ee.predict(model, ["w5 w6", ("w7", "w8")], tokenizer=tokenizer)


def test_predict_has_the_shapes_of_text_embeddings_inference(client, expected):
    scores = expected.logits.softmax(-1)
    one = client.post("/predict", json={"inputs": "w5 w6"}).json()
    assert one == client.post("/predict", json={"inputs": ["w5 w6"]}).json()
    order = scores[0].argsort(descending=True).tolist()
    assert [entry["label"] for entry in one] == [["bad", "so-so", "good"][index] for index in order]
    assert [entry["score"] for entry in one] == pytest.approx(scores[0][order].tolist(), abs=1e-5)
    several = client.post("/predict", json={"inputs": [["w5 w6"], ["w7", "w8"]], "truncate": True}).json()
    alone = client.post("/predict", json={"inputs": ["w7", "w8"]}).json()
    for got, same in zip(several, (one, alone), strict=True):
        assert [entry["label"] for entry in got] == [entry["label"] for entry in same]
        assert [entry["score"] for entry in got] == pytest.approx([entry["score"] for entry in same], abs=1e-5)
    raw = client.post("/predict", json={"inputs": [["w7", "w8"]], "raw_scores": True}).json()
    assert raw[0][0]["score"] == pytest.approx(float(expected.logits[1].max()), abs=1e-5)


def test_classify_tells_by_which_form_a_row_was_answered(client, make_client, model):
    for one, form in ((client, "fp32"), (make_client(ee.quantize_int8(model)), "int8")):
        answers = one.post("/v1/classify", json={"inputs": ["w5", "w6"]}).json()
        answers += one.post("/v1/classify", json={"inputs": ["w5"], "deadline": 0}).json()
        assert [answer["form"] for answer in answers] == [form] * 3


def test_classify_tells_the_layer_the_score_and_the_reason(client, model, tokenizer, expected):
    got = client.post("/v1/classify", json={"inputs": ["w5 w6", ["w7", "w8"]]}).json()
    for place, answer in enumerate(got):
        assert answer["label"] == model.config.id2label[int(expected.logits[place].argmax())]
        assert answer["logits"] == pytest.approx(expected.logits[place].tolist(), abs=1e-5)
        assert (answer["exit_layer"], answer["num_layers"]) == (int(expected.exit_layer[place]), 4)
        assert answer["reason"] == expected.reason[place]
        assert answer["exit_score"] == pytest.approx(float(expected.exit_score[place]), abs=1e-4)
    exact = client.post("/v1/classify", json={"inputs": ["w5 w6"], "operating_point": "exact"}).json()
    assert (exact[0]["exit_layer"], exact[0]["exit_score"]) == (4, None)
    budget = client.post("/v1/classify", json={"inputs": ["w5 w6"], "layer_budget": 1}).json()
    assert budget[0]["exit_layer"] == 1
    late = client.post("/v1/classify", json={"inputs": ["w5 w6"], "deadline": 0}).json()
    assert (got[0]["exits"], exact[0]["exits"]) == (None, None)
    assert (late[0]["exit_layer"], late[0]["label"], late[0]["reason"]) == (None, None, "deadline")


def test_every_exit_tells_what_it_says_where_that_is_asked_for(make_client, model, tokenizer, monkeypatch):
    client = make_client(model, limits=Limits(max_seconds=0.5))
    rows = {"inputs": ["w5 w6", ["w7", "w8"]], "exits": True}
    for answer, row in zip(client.post("/v1/classify", json=rows).json(), ["w5 w6", ("w7", "w8")], strict=True):
        views = ee.explain(model, row, tokenizer=tokenizer).exits
        assert [exit["layer"] for exit in answer["exits"]] == [1, 2, 3, 4]
        assert [exit["prediction"] for exit in answer["exits"]] == [view.prediction for view in views]
        assert [exit["score"] for exit in answer["exits"]] == pytest.approx([view.score for view in views], abs=1e-5)
        assert [exit["threshold"] for exit in answer["exits"]] == [view.threshold for view in views]
        leaves = [exit["layer"] for exit in answer["exits"] if exit["verdict"].startswith("leaves")]
        assert leaves == [answer["exit_layer"]]
    exact = client.post("/v1/classify", json={**rows, "operating_point": "exact"})
    assert [answer["exits"] for answer in exact.json()] == [None, None]
    begun, opened = threading.Event(), threading.Event()

    def slowly(*arguments):
        begun.set()
        assert opened.wait(60)

    monkeypatch.setattr(rows_of_server, "_views", slowly)
    with client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/v1/classify", json=rows)
        assert begun.wait(60)
        late = client.post("/v1/classify", json=rows)
        assert (late.status_code, late.json()["error_type"]) == (503, "overloaded")
        assert client.post("/v1/classify", json={"inputs": ["w5"]}).status_code == 200
        opened.set()
        assert first.result(60).status_code == 200


def test_pictures_come_as_files_in_base64(make_client):
    vit = new_model("vit", id2label={0: "cat", 1: "dog", 2: "owl"})
    processor = DeiTImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    client = make_client(vit, parts={"image_processor": processor}, limits=Limits(max_rows=4))
    noise = torch.randint(0, 256, (2, 20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures, encoded = [Image.fromarray(one.numpy()) for one in noise], []
    for picture, head in zip(pictures, ("", "data:image/png;base64,"), strict=True):
        file = io.BytesIO()
        picture.save(file, "png")
        encoded.append(head + base64.b64encode(file.getvalue()).decode())
    expected = ee.predict(vit, pictures, image_processor=processor)
    got = client.post("/v1/classify", json={"images": encoded, "exits": True}).json()
    for place, answer in enumerate(got):
        assert answer["logits"] == pytest.approx(expected.logits[place].tolist(), abs=1e-5)
        assert answer["label"] == vit.config.id2label[int(expected.logits[place].argmax())]
        assert answer["exit_layer"] == vit.exit_layers[-1]
    broken = client.post("/v1/classify", json={"images": [encoded[0], base64.b64encode(b"no picture").decode()]})
    assert broken.status_code == 422
    text = client.post("/v1/classify", json={"inputs": ["w5"]})
    assert (text.status_code, "reads pictures" in text.json()["error"]) == (422, True)
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 422
    assert client.post("/v1/classify", json={"images": encoded}).status_code == 200


@pytest.fixture(scope="module")
def picture_client(make_client):
    processor = BitImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    options = {"parts": {"image_processor": processor}, "limits": Limits(max_rows=4, max_pixels=500_000)}
    return make_client(new_model("vit", id2label={0: "cat", 1: "dog", 2: "owl"}), **options)


def file_of(width, height, kind="png", mode="L"):
    file = io.BytesIO()
    Image.new(mode, (width, height)).save(file, kind)
    return file.getvalue()


def pretended(width, height):
    """A PNG file that says of itself that it is so big."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    end = struct.pack(">I4sI", 4, b"IDAT", 0) * 2
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + end


@pytest.mark.parametrize(
    ("file", "status", "words"),
    [
        (file_of(100, 99), 200, ""),
        (file_of(1000, 900), 413, "1000 x 900 pixels; at most 500000 in all"),
        (file_of(1, 500), 413, "100 times as long as wide"),  # 16 x 8,000 where the shorter side becomes 16
        (pretended(10_000, 10_000), 413, "far too many pixels"),
        (pretended(50_000, 50_000), 413, "far too many pixels"),
        (pretended(100, 100), 422, "no picture that Pillow can read"),
        (file_of(100, 100)[:-40], 422, "no picture that Pillow can read"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 60, 422, "no picture that Pillow can read"),
        (b"GIF89a" + b"\0" * 20, 422, "no picture that Pillow can read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "no picture that Pillow can read"),
        (b"/etc/passwd", 422, "no picture that Pillow can read"),
        (b"", 422, "no picture that Pillow can read"),
    ],
    ids=range(12),
)
def test_what_is_no_picture_or_far_bigger_than_its_file_is_refused(picture_client, file, status, words):
    response = picture_client.post("/v1/classify", json={"images": [base64.b64encode(file).decode()]})
    assert response.status_code == status, response.text
    assert status == 200 or words in response.json()["error"]
    assert "object at 0x" not in response.text


def test_no_picture_is_a_program(picture_client, tmp_path, monkeypatch):
    """Pillow has Ghostscript run PostScript, where that is installed."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/run\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    program = file_of(16, 16, "eps", "RGB")
    with Image.open(io.BytesIO(program)) as opened, suppress(OSError):
        opened.load()
    assert (tmp_path / "run").exists()  # or the test is blind
    (tmp_path / "run").unlink()
    response = picture_client.post("/v1/classify", json={"images": [base64.b64encode(program).decode()]})
    assert (response.status_code, "PostScript" in response.json()["error"]) == (422, True)
    assert not (tmp_path / "run").exists()


def test_a_limit_of_tokens_cuts_texts_or_refuses_them(make_client, model):
    client = make_client(model, {"max_length": 6}, limits=Limits(max_tokens=6))
    long, cut = "w5 w6 w7 w8 w9 w10", "w5 w6 w7 w8"
    got = client.post("/predict", json={"inputs": [[long], [cut]], "raw_scores": True}).json()
    assert [one["score"] for one in got[0]] == pytest.approx([one["score"] for one in got[1]], abs=1e-5)
    refused = client.post("/predict", json={"inputs": long, "truncate": False})
    assert (refused.status_code, "8 tokens; at most 6" in refused.json()["error"]) == (422, True)
    assert client.post("/predict", json={"inputs": cut, "truncate": False}).status_code == 200
    answers = client.post("/v1/classify", json={"inputs": [long, cut], "exits": True}).json()
    assert answers[0]["exits"] == answers[1]["exits"]


def test_several_processes_keep_one_monitor_in_a_file(make_client, model, tmp_path):
    watches = [KeptMonitor(model, tmp_path / "seen.json", shadow=1.0, every=3600) for _ in range(2)]
    clients = [make_client(model, {"monitor": watch}, monitor=watch) for watch in watches]  # as two processes are
    for client in clients:
        assert client.post("/predict", json={"inputs": [["w5"], ["w6 w7"], ["w8"]]}).status_code == 200
        client.engine.close()
    for watch in watches:
        watch.close()
    watches[0].sync()
    saved = ee.Monitor.load(tmp_path / "seen.json")
    assert (saved.state.num_rows, saved.state.num_shadowed, saved.shadow) == (6, 6, 1.0)
    for client in clients:
        text = client.get("/metrics").text
        assert "hf_earlyexit_monitor_rows 6.0" in text
        assert f"hf_earlyexit_monitor_different {float(saved.state.num_different)}" in text
        assert "hf_earlyexit_monitor_limit 0.02" in text
    more = KeptMonitor(model, tmp_path / "seen.json", every=3600)
    more.record([1, 4], [True])
    more.close()
    assert (more.state.num_rows, more.state.num_shadowed) == (8, 7)
    with pytest.raises(UsageError, match="no exit"):
        more.record([7])
    with pytest.raises(UsageError, match="name another file"):
        KeptMonitor(new_model("bert", num_hidden_layers=2), tmp_path / "seen.json")


def test_the_limit_of_a_kept_monitor(model, tmp_path):
    """The one given; else what is promised of disagreement at the operating point that is served; else 0.02."""
    for name, limit in (("given", 0.05), ("usual", None)):
        watch = KeptMonitor(model, tmp_path / name, limit=limit, every=3600)
        watch.close()
        assert watch.limit == ee.Monitor.load(tmp_path / name).limit == (limit or 0.02)
    with pytest.raises(UsageError, match=r"keeps counts and alarms of the limit 0\.05, and limit is 0\.1\. ") as caught:
        KeptMonitor(model, tmp_path / "given", limit=0.1)
    assert caught.value.field == "limit"
    for limit in (0.05, None):  # goes on
        watch = KeptMonitor(model, tmp_path / "given", limit=limit, every=3600)
        watch.close()
        assert watch.limit == 0.05
    with pytest.raises(UsageError, match=r"limit is 1.5"):
        KeptMonitor(model, tmp_path / "never", limit=1.5)
    assert not (tmp_path / "never").exists()
    promised = copy.deepcopy(model)
    certificate = {"promise": {"risk": "disagreement", "limit": 0.03}, "exit_shares": None}
    promised.config.exit_certificate = certificate
    promised.config.exit_point_certificates = {
        "fast": {**certificate, "promise": {"risk": "disagreement", "limit": 0.07}},
        "lossy": {**certificate, "promise": {"risk": "drop", "limit": 0.01}},
    }
    promised.config.exit_operating_points = {name: promised.exit_policy.to_dict() for name in ("fast", "lossy")}
    for point, limit in ((None, 0.03), ("fast", 0.07), ("lossy", 0.02)):
        watch = KeptMonitor(promised, tmp_path / f"promised-{point}", operating_point=point, every=3600)
        watch.close()
        assert watch.limit == limit


def test_alarms_of_a_kept_monitor_are_of_all_that_write_into_its_file(model, tmp_path):
    watches = [KeptMonitor(model, tmp_path / "seen.json", fall_back=True, every=0.01) for _ in range(2)]
    for watch in watches:
        watch.record([1], [False])  # either's alone is too little to be sure
        watch.sync()
    assert not watches[0].falls_back
    assert watches[1].falls_back
    watches[0].record([1])
    ends_at = time.monotonic() + 60
    while not watches[0].falls_back:
        assert time.monotonic() < ends_at
        time.sleep(0.01)
    assert [alarm.kind for alarm in watches[0].state.alarms] == ["disagreement"]
    for watch in watches:
        watch.close()


def test_counts_that_cannot_be_kept_are_told_and_wait_until_they_can(model, tmp_path, caplog):
    path = tmp_path / "seen.json"
    watch = KeptMonitor(model, path, every=0.01)
    lock = path.with_name("seen.json.lock")
    lock.unlink()
    lock.mkdir()  # as where a disk is gone: it cannot be opened

    def waited(done):
        ends_at = time.monotonic() + 60
        while not done():
            assert time.monotonic() < ends_at
            time.sleep(0.01)

    watch.record([1, 2], [True])
    waited(lambda: "counts could not be kept" in caplog.text)
    lock.rmdir()
    waited(lambda: watch.state.num_rows == 2)
    watch.close()
    assert ee.Monitor.load(path).state.num_rows == 2


def test_rerank_puts_texts_in_order(make_client, client, tiny_model, tokenizer):
    model = tiny_model(num_labels=1)
    reranker = make_client(model)
    body = {"query": "w5", "texts": ["w6", "w7 w8", "w9"], "return_text": True}
    logits = ee.predict(model, [("w5", text) for text in body["texts"]], tokenizer=tokenizer).logits[:, 0]
    got = reranker.post("/rerank", json=body).json()
    order = logits.argsort(descending=True).tolist()
    assert [entry["index"] for entry in got] == order
    assert [entry["text"] for entry in got] == [body["texts"][index] for index in order]
    assert [entry["score"] for entry in got] == pytest.approx(logits.sigmoid()[order].tolist(), abs=1e-5)
    for count, status in ((0, 422), (32, 200), (33, 413), (10_000, 413)):
        assert reranker.post("/rerank", json={"query": "w5", "texts": ["w6"] * count}).status_code == status
    raw = reranker.post("/rerank", json={"query": "w5", "texts": ["w6"], "raw_scores": True}).json()
    assert raw == [{"index": 0, "score": pytest.approx(float(logits[0]), abs=1e-5)}]
    refused = client.post("/rerank", json=body)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "validation")
    assert "no reranker" in refused.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": [["w5"]] * 5}, 413, "5 rows; at most 4"),
        ({"inputs": "w5 " * 400}, 413, "1200 characters; at most 1000"),
        ({"inputs": "w5 " * 3000}, 413, "bytes; at most 5000"),
        ({"inputs": "w5 " * 70, "truncate": False}, 422, "72 tokens; at most 64"),
        ({"inputs": []}, 422, "inputs"),
        ({"inputs": ["a", "b", "c"]}, 422, "inputs"),
        ({"inputs": [[]]}, 422, "inputs"),
        ({"inputs": 3}, 422, "inputs"),
        ({"inputs": None}, 422, "inputs"),
        ({}, 422, "inputs"),
        ({"inputs": "w5", "model": "/etc"}, 422, "There is no field 'model'; expected inputs, raw_scores"),
        ({"inputs": "w5", "raw_scores": "yes"}, 422, "raw_scores"),
        ([1], 422, "body"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(client, body, status, words):
    response = client.post("/predict", json=body)
    assert response.status_code == status
    assert words in response.json()["error"]
    assert set(response.json()) == {"error", "error_type"}


BROKEN = [
    b"",
    b"{",
    b"[" * 4000,
    b'{"inputs": NaN}',
    b"\xff\xfe",
    b'{"inputs": ["\\ud800"]}',
    b'{"inputs": ["w5"], "deadline": NaN}',
    b'{"inputs": ["w5"], "deadline": 1e999}',
    b'{"inputs": ["w5"], "layer_budget": 1e400}',
    b'{"inputs": ["w5"], "layer_budget": -1}',
    b'{"inputs": ["w5"], "deadline": true}',
    b'{"inputs": ["w5"], "deadline": "1"}',
    b'{"inputs": ["w5"], "layer_budget": 2.0}',
    b'{"inputs": ["w5"], "layer_budget": ' + b"9" * 4500 + b"}",
    b'{"inputs": ["w5"], "operating_point": ""}',
    b'{"inputs": ["w5"], "\\ud800": 1}',
    b'{"inputs": ["w5"]} {"inputs": ["w5"]}',
    b'{"inputs": ["w5"], "operating_point": "\\ud800"}',
    b'{"inputs": ["w5"], "operating_point": "../fast"}',
    b'{"inputs": ["w5"], "images": ["aaaa"]}',
    b'{"images": ["aaaa"]}',
]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
def test_broken_bodies_are_refused_not_crashed_on(client, body):
    response = client.post("/v1/classify", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["error"]
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 200


@pytest.fixture
def gated(make_client, model, monkeypatch):
    """A client whose engine stands before its first layer until the event is set."""
    opened = threading.Event()

    class Gate(ModelWalker):
        def run_layer(self, layer, hidden, context):
            assert opened.wait(60)
            return super().run_layer(layer, hidden, context)

    monkeypatch.setattr(online, "walker_for", lambda model, graphs: Gate(model))
    yield make_client(model, {"max_queue": 2, "max_batch_tokens": 8}, limits=Limits(max_seconds=0.2)), opened
    opened.set()


def test_a_full_queue_is_429_a_long_wait_503_and_both_pass(gated):
    client, opened = gated
    slow = client.post("/predict", json={"inputs": "w5"})
    assert (slow.status_code, slow.json()["error_type"]) == (503, "overloaded")
    start = time.monotonic()
    full = client.post("/predict", json={"inputs": [["w5"]] * 9})
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert 0.1 <= time.monotonic() - start < 2  # clients that ask again at once would stop the engine
    assert client.get("/health").status_code == 200
    opened.set()
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 200
    client.engine.close()
    assert client.get("/ready").status_code == 503
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 503


def statuses(engine, clients, seconds):
    """What clients get who ask again at once, with eight rows each."""
    counted, ends_at = Counter(), time.monotonic() + seconds

    async def ask_on():
        while time.monotonic() < ends_at:
            try:
                await rows_of_server.answers_of(engine, ["w5 w6"] * 8, Limits())
                counted[200] += 1
            except rows_of_server.RefusedError as error:
                counted[error.status] += 1
                await asyncio.sleep(0)

    async def all_of_them():
        await asyncio.gather(*(ask_on() for _ in range(clients)))

    asyncio.run(all_of_them())
    return counted


def test_clients_that_never_wait_do_not_keep_the_engine_from_answering(model, tokenizer):
    with ee.Engine(model, tokenizer=tokenizer, max_queue=16) as engine:
        alone, crowd = (statuses(engine, clients, 1.5) for clients in (1, 48))
    assert set(crowd) == {200, 429}
    assert crowd[200] > alone[200] / 4


def test_a_key_guards_all_but_the_page_and_the_probes(make_client, model):
    client = make_client(model, api_key="s3cret")
    for path in ("/", "/health", "/ready"):
        assert client.get(path).status_code == 200
    for path in ("/metrics", "/docs", "/openapi.json", "/nothing"):
        assert client.get(path).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}, headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}, headers={"Authorization": "Bearer s3cret"}).status_code == 200
    for key in ("", "two words", "a file's\n", "schlüssel"):  # nobody could ever send it
        with pytest.raises(UsageError, match="cannot send in a header"):
            make_client(model, api_key=key)


def test_metrics_count_and_neither_they_nor_logs_hold_a_text(make_client, model, caplog):
    client = make_client(model)
    caplog.set_level(logging.DEBUG)
    client.post("/predict", json={"inputs": SECRET})
    client.post("/predict", json={"inputs": [SECRET, 3]})
    client.get(f"/{SECRET}")
    text = client.get("/metrics").text
    assert 'hf_earlyexit_requests_total{path="/predict",status="200"} 1.0' in text
    assert 'hf_earlyexit_requests_total{path="/predict",status="422"} 1.0' in text
    assert 'hf_earlyexit_requests_total{path="other",status="404"} 1.0' in text
    assert "hf_earlyexit_engine_answered 1.0" in text
    assert text.count("hf_earlyexit_exits_total{") == 1
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert "w43" not in text + " ".join(ours)


def test_a_replaced_model_answers_the_next_request(make_client, model, tiny_model, tokenizer):
    client = make_client(model)
    assert client.post("/predict", json={"inputs": "w5"}).json()[0]["label"] in ("bad", "so-so", "good")
    client.engine.replace(tiny_model(id2label={0: "x", 1: "y", 2: "z"}), tokenizer=tokenizer)
    assert client.post("/predict", json={"inputs": "w5"}).json()[0]["label"] in ("x", "y", "z")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_hold_all_they_need(client, path):
    response = client.get(path)
    assert "http" not in response.text
    assert 'name="viewport" content="width=device-width' in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


def test_the_reference_tells_every_path_field_and_status(client):
    text, schema = client.get("/docs").text, client.get("/openapi.json").json()
    for path in schema["paths"]:
        assert f" {path}</code>" in text
    for name in ("PredictRequest", "RerankRequest", "ClassifyRequest", "Classified", "Ranked"):
        for field in schema["components"]["schemas"][name]["properties"]:
            assert f"<code>{field}</code>" in text
    assert "429: The queue is full" in text
    assert "Most layers a row may run." in text
    assert client.get("/redoc").status_code == 404


@pytest.fixture(scope="module")
def reranker(make_client, tiny_model):
    return make_client(tiny_model(num_labels=1), limits=Limits(max_rows=4, max_body=5000))


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
@pytest.mark.parametrize("kind", ["client", "reranker", "picture_client"])
def test_no_request_that_the_schema_can_think_of_is_a_500(request, kind, mode):
    schema, tried = schemathesis.openapi.from_asgi("/openapi.json", request.getfixturevalue(kind).app), set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.method != "post":
            continue
        examples = 8 * int(os.environ.get("HF_EARLYEXIT_FUZZ", 1))

        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case):
            response = case.call()
            assert response.status_code < 500, response.text
            assert response.status_code < 400 or response.json()["error"]
            tried.add((case.path, response.status_code))

        call()
    assert {"/predict", "/rerank", "/v1/classify"} <= {path for path, _ in tried}
    if mode == schemathesis.GenerationMode.POSITIVE and kind != "picture_client":
        assert ("/predict", 200) in tried
        assert (("/rerank", 200) in tried) == (kind == "reranker")


@pytest.mark.parametrize("path", ["/predict", "/v1/classify", "/rerank"])
def test_half_a_surrogate_pair_is_told_of(make_client, tiny_model, path):
    client = make_client(tiny_model(num_labels=1))
    bodies = [b'{"inputs": ["w5", "\\ud83d"]}', b'{"inputs": "\\udc00"}', b'{"query": "\\ud83d", "texts": ["w5"]}']
    for body in bodies[2:] if path == "/rerank" else bodies[:1] if path == "/v1/classify" else bodies[:2]:
        response = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 422
        assert re.search("surrogate|unicode", response.json()["error"])


@pytest.mark.parametrize("shape", [PredictRequest, RerankRequest, ClassifyRequest])
def test_of_a_million_mistakes_only_the_first_is_told(shape):
    """Two megabytes of mistakes, an error of each, would be seconds in which nobody else is answered."""
    for name in shape.model_fields:
        for wrong in (1, [], None, [["w5"], 1, [[]]]):
            with pytest.raises(ValidationError) as caught:
                shape.model_validate({"query": "w5", "texts": ["w5"], name: [wrong] * 1000})
            assert caught.value.error_count() < 5
    with pytest.raises(ValidationError) as caught:
        shape.model_validate({f"field {number}": 1 for number in range(1000)})
    assert caught.value.error_count() == 1


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/ld+json", 200),
        (None, 415),
        ("", 415),
        ("text/plain", 415),  # as a page of another site may have a browser send it
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
        ("text/plain; application/json", 415),
        ("\xff;;=", 415),
    ],
)
def test_a_body_says_that_it_is_json(client, content_type, status):
    headers = {} if content_type is None else {"Content-Type": content_type.encode("latin-1")}
    response = client.post("/predict", content=b'{"inputs": "w5"}', headers=headers)
    assert response.status_code == status
    assert status == 200 or "Content-Type: application/json" in response.json()["error"]


def test_tokens_are_counted_while_others_are_answered_and_not_of_what_is_too_much(client, monkeypatch):
    counter = client.app.state.tokenizer
    begun, opened, read = threading.Event(), threading.Event(), type(counter).__call__

    def slowly(tokenizer, *texts, **options):
        if tokenizer is counter:
            begun.set()
            assert opened.wait(60)
        return read(tokenizer, *texts, **options)

    monkeypatch.setattr(type(counter), "__call__", slowly)
    with client, ThreadPoolExecutor(1) as pool:
        assert client.post("/predict", json={"inputs": "w5 " * 400, "truncate": False}).status_code == 413
        assert not begun.is_set()
        counted = pool.submit(client.post, "/predict", json={"inputs": "w5", "truncate": False})
        assert begun.wait(60)
        assert client.post("/predict", json={"inputs": "w5"}).status_code == 200
        opened.set()
        assert counted.result(60).status_code == 200


def test_an_engine_of_another_process_is_not_ready(make_client, model, monkeypatch):
    client = make_client(model)
    client.engine.submit("w5").result(60)
    with monkeypatch.context() as forked:
        forked.setattr(client.engine._worker, "process", 1)
        refused = client.post("/predict", json={"inputs": "w5"})
        assert (refused.status_code, refused.json()["error_type"]) == (503, "backend")
        assert "in process 1; a process forked from it" in refused.json()["error"]
        assert client.get("/ready").status_code == 503
    assert client.get("/ready").status_code == 200


def asked(app, coming, headers, method="POST", path="/v1/classify", note=lambda message: None):
    """What an app sends to one who sends these messages and then nothing more."""
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": [(b"content-type", b"application/json"), *headers], "http_version": "1.1", "scheme": "http",
             "root_path": "", "client": ("c", 1)}  # fmt: skip
    sent = []

    async def receive():
        return coming.pop(0) if coming else await asyncio.Event().wait()

    async def send(message):
        note(message)
        sent.append(message)

    async def ask():
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(ask())
    return sent


@pytest.mark.parametrize(("body", "status"), [(b'{"inputs": ["w5"]}', 200), (b'{"inputs": []}', 422)])
def test_whoever_has_an_answer_finds_its_request_counted(make_client, model, monkeypatch, body, status):
    app, events = make_client(model).app, []
    count = Metrics.count
    monkeypatch.setattr(Metrics, "count", lambda *given: (events.append(given[1:3]), count(*given)))
    coming = [{"type": "http.request", "body": body, "more_body": False}]
    sent = asked(
        app, coming, [(b"content-length", str(len(body)).encode())], note=lambda message: events.append(message["type"])
    )
    assert sent[0]["status"] == status
    assert events == [("/v1/classify", status), "http.response.start", "http.response.body"]


@pytest.mark.parametrize(("then", "status"), [("hangs", 408), ("goes", 400)])
def test_a_body_that_does_not_come_is_not_waited_for(make_client, model, then, status):
    app = make_client(model, limits=Limits(max_seconds=0.2)).app
    coming = [{"type": "http.request", "body": b'{"inputs": ["w5', "more_body": True}]
    if then == "goes":
        coming.append({"type": "http.disconnect"})
    sent = asked(app, coming, [(b"content-length", b"90")])
    assert sent[0]["status"] == status
    assert ((b"connection", b"close") in sent[0]["headers"]) == (then == "hangs")
    assert b"error" in sent[1]["body"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/health", [(b"transfer-encoding", b"chunked")], 200),
        ("POST", "/v1/classify", [(b"transfer-encoding", b"chunked")], 411),
        ("POST", "/v1/classify", [(b"transfer-encoding", b"chunked"), (b"content-length", b"9")], 411),
        ("POST", "/v1/classify", [(b"content-length", b"9000")], 413),
    ],
)
def test_a_body_that_may_be_of_any_size_is_not_read(client, method, path, headers, status):
    coming = [{"type": "http.request", "body": b"x" * 1000, "more_body": True} for _ in range(1000)]
    assert asked(client.app, coming, headers, method, path)[0]["status"] == status
    assert len(coming) > 990
