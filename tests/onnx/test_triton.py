"""The layout for inference servers: its files say what ONNX Runtime finds, and every row of a batch stops for itself."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import CheckpointError, UsageError
from hf_earlyexit.onnx import export
from hf_earlyexit.onnx.manifest import read_manifest
from tests.families.tiny import new_model
from tests.onnx.test_decisions import random_rows

NUMPY = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
ONNX = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}
EXAMPLES = Path(__file__).parents[2] / "examples"
MODULES = Path(__file__).parents[2] / "build" / "node" / "node_modules"


def read_pbtxt(text):
    """A text-format message: every field's values, in order."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.-]+|[\[\]{}:,]', text)

    def value():
        token = tokens.pop(0)
        if token == "{":
            return message("}")
        return json.loads(token) if token[0] in '"-0123456789' else token

    def message(end):
        fields = {}
        while tokens and tokens[0] != end:
            name = tokens.pop(0)
            if tokens[0] == ":":
                tokens.pop(0)
            if tokens[0] == "[":
                tokens.pop(0)
                while tokens[0] != "]":
                    fields.setdefault(name, []).append(value())
                    if tokens[0] == ",":
                        tokens.pop(0)
                tokens.pop(0)
            else:
                fields.setdefault(name, []).append(value())
        if tokens:
            tokens.pop(0)
        return fields

    return message("")


@pytest.fixture(scope="module")
def served(traced, open_policy):
    model = traced().model
    model.config.id2label = {0: "bad", 1: "so-so", 2: "good"}
    model.set_exit_policy(open_policy(model, "entropy"))
    return model


@pytest.fixture(scope="module")
def folder(served, traced, tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("repository") / "reviews"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "walk_graph", lambda model: traced().whole)
        ee.export_onnx(served, place, layout="triton", tokenizer=tokenizer)
    return place


@pytest.fixture(scope="module")
def described(folder):
    return read_pbtxt((folder / "config.pbtxt").read_text())


@pytest.fixture(scope="module")
def session(folder):
    (version,) = [path for path in folder.iterdir() if path.name.isdigit()]
    return ort.InferenceSession(version / "model.onnx", providers=["CPUExecutionProvider"])


def padded(rows, described, width):
    """Rows as the config's inputs; what stands in the padding is nobody's business."""
    rng = np.random.default_rng(0)
    feeds = {}
    for tensor in described["input"]:
        (name,), (kind,) = tensor["name"], tensor["data_type"]
        feeds[name] = rng.integers(0, 2, (len(rows), width)).astype(NUMPY[kind])
        for place, row in enumerate(rows):
            given = row.get(name, [1] * len(row["input_ids"]))
            feeds[name][place, : len(given)] = given
            if name == "attention_mask":
                feeds[name][place, len(given) :] = 0
    return feeds


def test_files_say_what_the_graph_is(folder, described, session, served):
    assert described["name"] == [folder.name]
    assert described["backend"] == ["onnxruntime"]
    assert described["max_batch_size"][0] > 1
    assert described["dynamic_batching"][0]["max_queue_delay_microseconds"][0] > 0
    for part, infos in (("input", session.get_inputs()), ("output", session.get_outputs())):
        assert [tensor["name"][0] for tensor in described[part]] == [info.name for info in infos]
        for tensor, info in zip(described[part], infos, strict=True):
            assert ONNX[tensor["data_type"][0]] == info.type
            assert not isinstance(info.shape[0], int)  # the batch, which the config leaves out
            assert tensor["dims"] == [axis if isinstance(axis, int) else -1 for axis in info.shape[1:]]
    (labels,) = [tensor["label_filename"][0] for tensor in described["output"] if "label_filename" in tensor]
    assert (folder / labels).read_text().splitlines() == ["bad", "so-so", "good"]
    assert "1/model.onnx" in read_manifest(folder)["files"]
    assert (folder / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("count", [1, 2, 31])
def test_every_row_of_a_batch_stops_for_itself_whatever_its_padding(described, session, served, count):
    rows = random_rows(31, seed=7)[:count]
    expected = ee.predict(served, rows)
    assert count < 31 or len(set(expected.exit_layer.tolist())) > 2
    names = [tensor["name"][0] for tensor in described["output"]]
    longest = max(len(row["input_ids"]) for row in rows)
    for width in (longest, longest + 30):  # also more than the model has places for
        answers = dict(zip(names, session.run(names, padded(rows, described, width)), strict=True))
        for tensor in described["output"]:
            assert answers[tensor["name"][0]].shape == (count, *tensor["dims"])
        assert answers["exit_layer"][:, 0].tolist() == expected.exit_layer.tolist()
        assert np.allclose(answers["logits"], expected.logits, atol=2e-5)
        assert np.allclose(answers["exit_score"][:, 0], expected.exit_score, atol=2e-5)


def test_layers_behind_the_exit_are_not_run(described, session, folder, tmp_path):
    settings = ort.SessionOptions()
    settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / "profile")
    watched = ort.InferenceSession(folder / "1" / "model.onnx", settings, providers=["CPUExecutionProvider"])
    rows = random_rows(40, seed=9)
    layers = session.run(["exit_layer"], padded(rows, described, 64))[0][:, 0]
    early = [row for row, layer in zip(rows, layers, strict=True) if layer == 1][:3]
    assert early
    watched.run(None, padded(early, described, 64))
    events = json.loads(Path(watched.end_profiling()).read_text())
    run = sum(event.get("cat") == "Node" and "MatMul" in event["args"].get("op_name", "") for event in events)
    full = sum("MatMul" in node for node in _products(folder))
    assert 0 < run / len(early) < full / 3


def _products(folder):
    import onnx

    from hf_earlyexit.onnx.graphs import all_nodes

    return [node.op_type for node in all_nodes(onnx.load(folder / "1" / "model.onnx").graph)]


def test_the_command_writes_it_and_says_what_cannot_be(served, traced, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(export, "walk_graph", lambda model: traced().whole)
    ee.save(served, tmp_path / "model", tokenizer=tokenizer)
    out = tmp_path / "repository" / "mood-2"
    assert main(["export", "onnx", str(tmp_path / "model"), str(out), "--layout", "triton"]) == 0
    assert "triton" in capsys.readouterr().out
    assert read_pbtxt((out / "config.pbtxt").read_text())["name"] == ["mood-2"]
    (out / "1" / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(out)
    assert main(["export", "onnx", str(tmp_path / "model"), str(out), "--layout", "tritone"]) == 2
    with pytest.raises(UsageError, match="becomes the model's"):
        ee.export_onnx(served, tmp_path / "my model", layout="triton")
    plain = traced("multi").model
    with pytest.raises(UsageError, match="no exit policy"):
        ee.export_onnx(plain, tmp_path / "none", layout="triton")


def test_pictures_go_in_batches_too(tmp_path):
    vit = new_model("vit", num_hidden_layers=2)
    noise = torch.randint(0, 256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    with torch.inference_mode():
        sure = vit(pixel_values=noise, early_exit=False).exit_logits[:, 0].softmax(-1).amax(-1).sort().values
    vit.set_exit_policy(ee.policies.ConfidencePolicy(thresholds=[float(sure[5:7].mean())]))
    ee.export_onnx(vit, tmp_path / "pictures", layout="triton")
    (given,) = read_pbtxt((tmp_path / "pictures" / "config.pbtxt").read_text())["input"]
    assert (given["name"], given["data_type"], given["dims"]) == (["pixel_values"], ["TYPE_FP32"], [3, 16, 16])
    alone = ort.InferenceSession(tmp_path / "pictures" / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    logits, layers, _ = alone.run(None, {"pixel_values": noise.numpy()})
    expected = ee.predict(vit, [{"pixel_values": one} for one in noise])
    assert layers[:, 0].tolist() == expected.exit_layer.tolist()
    assert np.allclose(logits, expected.logits, atol=2e-5)
    assert set(layers[:, 0].tolist()) == {1, 2}


def test_a_program_without_python_gives_the_same_answers(folder, served):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    environment = {"NODE_PATH": str(MODULES), "PATH": str(Path(node).parent)}
    there = subprocess.run([node, "-e", "require.resolve('onnxruntime-node')"], env=environment, capture_output=True)
    if there.returncode:
        pytest.skip("onnxruntime-node is missing: npm install --ignore-scripts --prefix build/node onnxruntime-node")
    rows = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in random_rows(20, seed=11)]
    expected = ee.predict(served, rows)
    lines = "".join(json.dumps(row["input_ids"]) + "\n" for row in rows)
    done = subprocess.run(
        [node, str(EXAMPLES / "classify.js"), str(folder)],
        env=environment, input=lines, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["label"] for answer in answers] == [
        served.config.id2label[index] for index in expected.logits.argmax(-1).tolist()
    ]
    assert [answer["exit_layer"] for answer in answers] == expected.exit_layer.tolist()
    assert torch.allclose(torch.tensor([answer["exit_score"] for answer in answers]), expected.exit_score, atol=2e-5)
