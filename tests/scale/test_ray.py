"""Answers from several processes: those of one, in any split, and none is lost or doubled when a process dies."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil

import hf_earlyexit as ee
from hf_earlyexit.cli import predict_files
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import UsageError
from hf_earlyexit.scale.ray import Classify
from tests.families.tiny import new_model

ray = pytest.importorskip("ray", reason="ray is missing, which runs the processes (extra: ray)")
pytestmark = pytest.mark.filterwarnings("default")
ROWS = 240


class DiesOnce(Classify):
    """Its process is killed at the second block that anybody is given."""

    def __call__(self, block):
        marks = Path(os.environ["HF_EARLYEXIT_TEST_MARKS"])
        count = len(list(marks.iterdir()))
        (marks / f"{count}-{os.getpid()}").touch()
        if count == 1:
            os.kill(os.getpid(), 9)
        return super().__call__(block)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A local Ray, started once; where `DiesOnce` leaves its marks."""
    marks = tmp_path_factory.mktemp("marks")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_EARLYEXIT_TEST_MARKS": str(marks),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # on a busy machine they would starve
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }.items():
            patch.setenv(name, value)
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000)
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield marks
        ray.shutdown()


@pytest.fixture(scope="module")
def model(tiny_model, open_policy):
    model = tiny_model(id2label={0: "bad", 1: "so-so", 2: "good"})
    fast = open_policy(model, "entropy", share=0.7)
    model.set_operating_points({"slow": open_policy(model, "entropy", share=0.2), "fast": fast}, default="slow")
    return model


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "model"
    ee.save(model, folder, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def texts(random_texts):
    return random_texts(ROWS)


@pytest.fixture(scope="module")
def expected(model, tokenizer, texts):
    """Label, score and exit layer of each row at the operating point "fast"."""
    answers = ee.predict(model, texts, tokenizer=tokenizer, operating_point="fast")
    scores, labels = answers.logits.softmax(-1).max(-1)
    assert len(set(answers.exit_layer.tolist())) > 2
    names = [model.config.id2label[index] for index in labels.tolist()]
    return pandas.DataFrame({"label": names, "score": scores.tolist(), "exit_layer": answers.exit_layer.tolist()})


def check(table, expected):
    table = table.sort_values("id", ignore_index=True)
    assert table["id"].tolist() == list(range(ROWS))  # none lost, none doubled
    assert table["label"].tolist() == expected["label"].tolist()
    assert table["exit_layer"].tolist() == expected["exit_layer"].tolist()
    assert np.allclose(table["score"].astype(float), expected["score"], atol=1e-5)


@pytest.mark.slow
def test_rows_are_answered_once_in_any_split_though_a_process_dies(cluster, folder, texts, expected):
    rows = pandas.DataFrame({"id": range(ROWS), "text": texts, "label": 7})
    dataset = ray.data.from_pandas(rows).repartition(7)
    found = ee.ray.predict(dataset, folder, operating_point="fast", workers=2, batch_size=13, classify=DiesOnce)
    table = found.to_pandas()
    check(table, expected)
    assert set(table["input_label"]) == {7}
    processes = [mark.name.split("-")[1] for mark in cluster.iterdir()]
    assert len(processes) > ROWS // 13
    assert len(set(processes)) > 1
    whole = Classify(str(folder), "cpu", None, {"operating_point": "fast"})
    check(pandas.DataFrame(whole({name: rows[name].to_numpy() for name in rows})), expected)  # as one block


@pytest.mark.slow
def test_pictures_and_refusals(cluster, folder, tmp_path):
    vit = new_model("vit")
    processor = DeiTImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    ee.save(vit, tmp_path / "vit", image_processor=processor)
    noise = torch.randint(0, 256, (4, 20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pictures = [Image.fromarray(one.numpy()) for one in noise]
    encoded = []
    for picture in pictures:
        file = io.BytesIO()
        picture.save(file, "png")
        encoded.append(file.getvalue())
    classify = Classify(str(tmp_path / "vit"), "cpu", None, {})
    answers = ee.predict(vit, pictures, image_processor=processor)
    pixels = processor(pictures, return_tensors="np")["pixel_values"]
    for block in ({"bytes": np.array(encoded, dtype=object)}, {"image": noise.numpy()}, {"pixel_values": pixels}):
        found = classify(block)
        assert list(found["label"]) == [vit.config.id2label[index] for index in answers.logits.argmax(-1).tolist()]
        assert found["exit_layer"].tolist() == answers.exit_layer.tolist()
    dataset = ray.data.from_items([{"text": "w5"}])
    for options, words in (({"workers": 0}, "workers"), ({"workers": (1, 2, 3)}, "workers"), ({"batch_size": 0}, "batch")):
        with pytest.raises(UsageError, match=words):
            ee.ray.predict(dataset, folder, **options)


def test_columns_of_a_block_become_rows(folder, model, tokenizer):
    pairs = Classify(str(folder), "cpu", ("first", "second"), {})
    block = {
        "first": np.array(["w5 w6", "w7"], dtype=object),
        "second": np.array(["w8", "w9 w10"]),
        "label": np.array([1, 2]),
    }
    answers = ee.predict(model, [("w5 w6", "w8"), ("w7", "w9 w10")], tokenizer=tokenizer)
    found = pairs(block)
    assert found["exit_layer"].tolist() == answers.exit_layer.tolist()
    assert found["score"].tolist() == pytest.approx(answers.logits.softmax(-1).amax(-1).tolist(), abs=1e-6)
    assert found["input_label"].tolist() == [1, 2]
    assert list(found) == ["first", "second", "input_label", "label", "score", "exit_layer"]


class DiesAtFile(predict_files.FileAnswerer):
    """Its process is killed in the middle of a file, once."""

    def __call__(self, job):
        mark = Path(os.environ["HF_EARLYEXIT_TEST_MARKS"]) / "file"
        if not mark.exists():
            mark.touch()
            Path(job["output"] + ".part").write_text("half an answer")
            os.kill(os.getpid(), 9)
        return super().__call__(job)


@pytest.mark.slow
def test_files_are_answered_once_and_a_stopped_run_goes_on(cluster, folder, texts, expected, tmp_path, capsys, monkeypatch):
    (tmp_path / "in" / "more").mkdir(parents=True)
    places = [tmp_path / "in" / name for name in ("a.parquet", "b.parquet", "more/a.parquet")]
    for part, place in enumerate(places):
        rows = list(range(part, ROWS, 3))
        pandas.DataFrame({"id": rows, "text": [texts[row] for row in rows]}).to_parquet(place)
    out = tmp_path / "out"
    words = ["predict", str(folder), "--engine", "ray", "--input", f"{tmp_path}/in/**/*.parquet", "--output", str(out)]
    words += ["--operating_point", "fast", "--workers", "1"]
    whole = places[1].read_bytes()
    places[1].write_bytes(whole[:300])
    monkeypatch.setattr(predict_files, "FileAnswerer", DiesAtFile)
    assert main(words) == 2
    assert "1 of 3 files could not be answered" in capsys.readouterr().err
    answered = {path.relative_to(out).as_posix() for path in out.rglob("*.parquet")}
    assert answered == {"a.parquet", "more/a.parquet"}
    times = {name: (out / name).stat().st_mtime_ns for name in answered}
    places[1].write_bytes(whole)
    assert main(words) == 2
    assert "--resume true" in capsys.readouterr().err
    assert main([*words, "--resume", "true", "--early_exit", "false"]) == 2
    assert "early_exit differs" in capsys.readouterr().err
    assert main([*words, "--resume", "true", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["files"], summary["files_before"], summary["rows"]) == (1, 2, ROWS // 3)
    assert {name: (out / name).stat().st_mtime_ns for name in answered} == times
    check(pandas.concat([pandas.read_parquet(path) for path in out.rglob("*.parquet")]), expected)
    assert not list(out.rglob("*.part*"))
    os.utime(places[0], ns=(1, 1))
    assert main([*words, "--resume", "true"]) == 2
    assert "has changed" in capsys.readouterr().err


@pytest.mark.slow
def test_copies_behind_ray_serve_answer_as_predict_does(cluster, folder, texts, expected):
    """The example, as its own process in the cluster that is there."""
    pytest.importorskip("ray.serve", reason="ray[serve] is missing, which starts the copies (extra: ray)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    example = Path(__file__).parents[2] / "examples" / "ray_serve.py"
    words = [sys.executable, example, folder, "--port", str(port), "--operating_point", "fast"]
    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=os.environ | address, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == f"http://127.0.0.1:{port}\n", process.communicate(timeout=60)[1][-3000:]

            def ask(inputs):
                body = json.dumps({"inputs": inputs}).encode()
                url, header = f"http://127.0.0.1:{port}/v1/classify", {"Content-Type": "application/json"}
                with urllib.request.urlopen(urllib.request.Request(url, body, header), timeout=60) as response:
                    return json.load(response)

            answers = ask(texts[:32])
            assert [answer["label"] for answer in answers] == expected["label"][:32].tolist()
            assert [answer["exit_layer"] for answer in answers] == expected["exit_layer"][:32].tolist()
            with pytest.raises(urllib.error.HTTPError, match="422"):
                ask(7)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
