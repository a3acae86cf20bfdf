"""Answers over HTTP: the shapes clients know, limits in words, and no 500 whatever comes."""

import logging
import threading

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings

import hf_earlyexit as ee
from hf_earlyexit.server.app import make_app
from hf_earlyexit.server.rows import Limits
from hf_earlyexit.serving import online
from hf_earlyexit.serving.walker import ModelWalker

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

    def make(model, engine_options=None, **options):
        engine = ee.Engine(model, tokenizer=tokenizer, **(engine_options or {}))
        made.append(engine)
        client = TestClient(make_app(engine, tokenizer=tokenizer, **options), raise_server_exceptions=False)
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
    assert (late[0]["exit_layer"], late[0]["label"], late[0]["reason"]) == (None, None, "deadline")


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
        ({"inputs": "w5 " * 70, "truncate": False}, 422, "72 tokens; the model takes 64"),
        ({"inputs": []}, 422, "inputs"),
        ({"inputs": ["a", "b", "c"]}, 422, "inputs"),
        ({"inputs": [[]]}, 422, "inputs"),
        ({"inputs": 3}, 422, "inputs"),
        ({"inputs": None}, 422, "inputs"),
        ({}, 422, "inputs"),
        ({"inputs": "w5", "model": "/etc"}, 422, "model"),
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
    full = client.post("/predict", json={"inputs": [["w5"]] * 9})
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert client.get("/health").status_code == 200
    opened.set()
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 200
    client.engine.close()
    assert client.get("/ready").status_code == 503
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 503


def test_a_key_guards_all_but_the_page_and_the_probes(make_client, model):
    client = make_client(model, api_key="s3cret")
    for path in ("/", "/health", "/ready"):
        assert client.get(path).status_code == 200
    for path in ("/metrics", "/docs", "/openapi.json", "/nothing"):
        assert client.get(path).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}, headers={"Authorization": "Bearer other"}).status_code == 401
    assert client.post("/predict", json={"inputs": "w5"}, headers={"Authorization": "Bearer s3cret"}).status_code == 200


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


def test_the_page_holds_all_it_needs(client):
    response = client.get("/")
    assert "http" not in response.text.replace("http-equiv", "")
    assert 'name="viewport" content="width=device-width' in response.text
    assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize("mode", [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE])
def test_no_request_that_the_schema_can_think_of_is_a_500(client, mode):
    schema, tried = schemathesis.openapi.from_asgi("/openapi.json", client.app), set()
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.method != "post":
            continue

        @settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case):
            response = case.call()
            assert response.status_code < 500, response.text
            tried.add((case.path, response.status_code))

        call()
    assert {"/predict", "/rerank", "/v1/classify"} <= {path for path, _ in tried}
    if mode == schemathesis.GenerationMode.POSITIVE:
        assert ("/predict", 200) in tried
