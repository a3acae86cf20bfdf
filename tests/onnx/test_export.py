"""The exported folder: whole, checked at every load, usable like a torch model; int8 with thresholds of its own."""

import dataclasses
import json
import shutil
import threading
from collections import Counter

import numpy as np
import onnxruntime as ort
import pytest
import torch
from datasets import Dataset

import hf_earlyexit as ee
from hf_earlyexit.calibration import Certified, parse_target
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import CheckpointError, DataError, PolicyError, UsageError
from hf_earlyexit.onnx import export
from hf_earlyexit.onnx.manifest import MANIFEST, read_manifest, write_manifest
from hf_earlyexit.onnx.one_row import OneRow
from hf_earlyexit.policies import StaticPolicy
from tests.onnx.conftest import feeds
from tests.onnx.test_decisions import random_rows
from tests.work import calls


@pytest.fixture(scope="module")
def model(tiny_model):
    """Like the traced one, with a policy calibrated on its own trace."""
    return tiny_model(exit_gate="mlp+logits")


@pytest.fixture(scope="module")
def labelled(model, open_policy):
    """Rows whose labels are the answers of exits that are sure, so that leaving at different layers is right."""
    rows = random_rows(300, seed=3)
    model.set_exit_policy(open_policy(model, "confidence"))
    return rows, ee.predict(model, rows).logits.argmax(-1).tolist()


TARGET = ee.LayerBudget(2.5)


@pytest.fixture(scope="module")
def served(model, labelled):
    trace = ee.collect_trace(model, labelled[0], labels=labelled[1], progress=False)
    model.set_exit_policy(ee.calibrate(trace, "confidence", TARGET, keep_weak_exits=True))
    model.set_operating_points({"slow": ee.ConfidencePolicy(thresholds=(None, None, 0.5))})
    return model


@pytest.fixture(autouse=True)
def traced_once(traced, served, monkeypatch):
    """The walk of this very model was traced already; tracing takes seconds."""
    monkeypatch.setattr(export, "walk_graph", lambda model: traced().whole)


@pytest.fixture(scope="module")
def folder(served, traced, tmp_path_factory, tokenizer):
    place = tmp_path_factory.mktemp("onnx") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "walk_graph", lambda model: traced().whole)
        ee.export_onnx(served, place, tokenizer=tokenizer)
    return place


@pytest.fixture(scope="module")
def loaded(folder):
    return ee.OnnxClassifier.from_pretrained(folder)


def test_the_folder_answers_as_the_model(served, loaded, folder, tokenizer, random_texts):
    texts = random_texts(40)
    truth, told = (ee.predict(each, texts, tokenizer=tokenizer) for each in (served, loaded))
    assert len(set(truth.exit_layer.tolist())) > 1
    assert torch.equal(truth.exit_layer, told.exit_layer)
    assert truth.reason == told.reason
    assert torch.allclose(truth.logits, told.logits, atol=2e-5)
    assert torch.allclose(truth.exit_score, told.exit_score, atol=2e-5)
    streamed = list(ee.stream(loaded, iter(texts), tokenizer=tokenizer, window=7))
    assert [answer.exit_layer for answer in streamed] == truth.exit_layer.tolist()
    session = ort.InferenceSession(folder / "model.onnx")
    alone = [session.run(["exit_layer"], dict(tokenizer(text, return_tensors="np")))[0][0] for text in texts]
    assert alone == truth.exit_layer.tolist()


def test_a_row_that_comes_alone_runs_through_the_one_file(served, folder, tokenizer, random_texts, monkeypatch):
    model, texts = ee.OnnxClassifier.from_pretrained(folder), random_texts(30)
    walker, opened = model.walker, []
    alone = walker.one_row._open_file
    monkeypatch.setattr(walker.one_row, "_open_file", lambda: opened.append(1) or alone())
    rows = [tokenizer(text, return_tensors="np") for text in texts]
    together = [model(**row, operating_point=None, shadowed=[0]) for row in rows]  # a shadow needs the layers
    assert not opened
    single = [model(**row) for row in rows]
    assert opened == [1]
    right = ee.predict(served, texts, tokenizer=tokenizer)
    for number, (one, layers) in enumerate(zip(single, together, strict=True)):
        assert one.exit_layer.tolist() == layers.exit_layer.tolist() == [int(right.exit_layer[number])]
        assert (one.logits - layers.logits).abs().max() <= 1e-5
        assert float(one.exit_score) == pytest.approx(float(layers.exit_score), abs=1e-5)
    assert len({int(one.exit_layer) for one in single}) > 1
    full = model(**rows[0], early_exit=False)
    assert full.exit_logits.shape[1] == 4
    monkeypatch.setattr(walker, "one_row", OneRow(None, walker.one_row.values))  # fails where it is called
    model.set_exit_policy(StaticPolicy.at(1, 4, exit_layers=model.exit_layers))
    assert model(**rows[0]).exit_layer.tolist() == [model.exit_layers[1]]  # another policy than the file holds
    assert model(**tokenizer(texts[:2], padding=True, return_tensors="np")).exit_layer.tolist() == [model.exit_layers[1]] * 2


@pytest.fixture
def counted(folder, monkeypatch):
    """A model, and how many rows came to its one-file form and how often its first layer ran."""
    model, counts = ee.OnnxClassifier.from_pretrained(folder), Counter()
    run_layer, one_row = model.walker.run_layer, OneRow.__call__

    def layers(layer, hidden, context):
        counts["layers"] += layer == 1
        return run_layer(layer, hidden, context)

    def in_one(self, row):
        counts["one file"] += 1
        return one_row(self, row)

    monkeypatch.setattr(model.walker, "run_layer", layers)
    monkeypatch.setattr(OneRow, "__call__", in_one)
    return model, counts


def test_predict_takes_the_one_file_for_a_row_that_is_alone(served, counted, tokenizer, random_texts):
    (model, counts), texts = counted, random_texts(30)
    right = ee.predict(served, texts, tokenizer=tokenizer)
    told = [ee.predict(model, [text], tokenizer=tokenizer) for text in texts]
    assert counts == {"one file": 30}
    assert [int(one.exit_layer) for one in told] == right.exit_layer.tolist()
    assert [one.reason[0] for one in told] == right.reason
    assert len(set(right.exit_layer.tolist())) > 1
    assert torch.allclose(torch.cat([one.logits for one in told]), right.logits, atol=2e-5)
    assert torch.allclose(torch.cat([one.exit_score for one in told]), right.exit_score, atol=2e-5)
    others = ({"layer_budget": 2}, {"deadline": 1000}, {"early_exit": False}, {"operating_point": "slow"})
    for options in ({"monitor": ee.Monitor(model, limit=0.5, shadow=1.0)}, *others):  # which the file knows nothing of
        ee.predict(model, texts[:1], tokenizer=tokenizer, **options)
    assert counts == {"one file": 30, "layers": 5}
    ee.predict(model, texts[:2], tokenizer=tokenizer)
    slots = ee.predict(model, [texts[0], 5], tokenizer=tokenizer, errors="slot")
    assert counts == {"one file": 31, "layers": 6}
    assert list(slots.errors) == [1]


def test_an_engine_takes_the_one_file_for_a_row_while_there_is_nothing_else(served, counted, tokenizer, random_texts):
    (model, counts), texts = counted, random_texts(30)
    right = ee.predict(served, texts, tokenizer=tokenizer)
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        told = [engine.submit(text).result() for text in texts]
        assert counts == {"one file": 30}
        assert engine.state.batches == engine.state.answered == 30
        assert engine.state.batch_tokens == sum(len(tokenizer(text)["input_ids"]) for text in texts)
        begun, going_on = threading.Event(), threading.Event()
        one_row = OneRow.__call__

        def waits(self, row):
            begun.set()
            assert going_on.wait(10)
            return one_row(self, row)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(OneRow, "__call__", waits)
            first = engine.submit(texts[0])
            assert begun.wait(10)
            others = [engine.submit(text) for text in texts[1:]]
            going_on.set()
            told += [future.result() for future in (first, *others)]
        assert counts["one file"] == 31  # the others came together
        engine.submit(texts[0], deadline=1000).result()
        engine.submit(texts[0], layer_budget=2).result()
        assert counts["one file"] == 31
    assert [answer.exit_layer for answer in told] == 2 * right.exit_layer.tolist()
    assert [answer.reason for answer in told] == 2 * right.reason


def test_a_row_that_comes_alone_costs_little_beside_the_session(folder, tokenizer):
    model, row = ee.OnnxClassifier.from_pretrained(folder), tokenizer("w5 w6 w7", return_tensors="pt")
    model(**row)
    made = calls(lambda: model(**row), "hf_earlyexit/")
    assert made.total() <= 16, made  # checks of the three inputs, and of the answer; no policy is made


def test_options_of_predict_hold(served, loaded, tokenizer, random_texts):
    texts = [*random_texts(20), 5]
    for options in ({"early_exit": False}, {"layer_budget": 2}, {"operating_point": "slow"}, {"operating_point": "exact"}):
        truth, told = (ee.predict(each, texts[:-1], tokenizer=tokenizer, **options) for each in (served, loaded))
        assert torch.equal(truth.exit_layer, told.exit_layer)
    told = ee.predict(loaded, texts, tokenizer=tokenizer, errors="slot")
    assert list(told.errors) == [20]


def test_traces_are_equal_so_calibrations_of_the_model_serve(served, loaded, labelled):
    truth, told = (ee.collect_trace(each, labelled[0], labels=labelled[1], progress=False) for each in (served, loaded))
    assert torch.allclose(truth.logits, told.logits, atol=2e-5)
    assert torch.allclose(truth.scalars["gate"], told.scalars["gate"], atol=2e-5)
    assert truth.fingerprint == told.fingerprint
    loaded.set_exit_policy(ee.calibrate(truth, "confidence", TARGET, keep_weak_exits=True))


def test_the_pipeline_serves_it(served, loaded, tokenizer, random_texts):
    texts = random_texts(6)
    truth, told = (ee.pipeline(model=each, tokenizer=tokenizer)(texts) for each in (served, loaded))
    assert [(one["label"], one["exit_layer"]) for one in truth] == [(one["label"], one["exit_layer"]) for one in told]


def test_no_rows_no_tokens_too_many_tokens(served, loaded):
    nothing = torch.zeros(0, 5, dtype=torch.long)
    for early_exit in (True, False):
        assert loaded(nothing, early_exit=early_exit).logits.shape == (0, 3)
    assert ee.predict(loaded, []).logits.shape == (0, 3)
    for width in (0, 65):
        with pytest.raises(DataError, match="takes 1 to 64"):
            loaded(torch.ones(1, width, dtype=torch.long))
    hollow = {"input_ids": [5, 6], "attention_mask": [0, 0]}
    with pytest.raises(DataError, match="no real token"):
        ee.predict(loaded, [hollow])


@pytest.mark.parametrize("harm", ["missing", "shorter", "changed"])
@pytest.mark.parametrize("name", ["model.onnx", "layer-03.onnx", "begin.onnx", "tokenizer.json"])
def test_a_damaged_file_is_named(folder, tmp_path, name, harm):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if harm == "shorter":
        (copy / name).write_bytes(data[:-1])
    elif harm == "changed":
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name) as caught:
        ee.OnnxClassifier.from_pretrained(copy)
    assert caught.value.path == str(copy / name)


def test_a_changed_manifest_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    told = json.loads((copy / MANIFEST).read_text())
    thresholds = told["config"]["exit_policy"]["thresholds"]
    assert thresholds == list(ee.OnnxClassifier.from_pretrained(copy).exit_policy.thresholds)
    for text in (
        json.dumps(told).replace(str(thresholds[0]), "0.123"),
        json.dumps(told).replace("hf_earlyexit.onnx/1", "hf_earlyexit.onnx/2"),
        json.dumps(told)[:-9],
    ):
        (copy / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match=MANIFEST):
            ee.OnnxClassifier.from_pretrained(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        ee.OnnxClassifier.from_pretrained(copy)


def test_a_manifest_of_many_labels_is_read_as_it_was_written(tmp_path):
    config = ee.EarlyExitBertConfig(num_labels=12).to_dict()
    values = {"config": config, "dtype": "float32", "static": False, "fingerprint": "f"}
    write_manifest(tmp_path, values)
    assert read_manifest(tmp_path)["config"]["id2label"]["11"] == "LABEL_11"


def test_files_name_no_place_of_this_machine(folder):
    for path in folder.glob("*.onnx"):
        assert b".py" not in path.read_bytes(), path


def test_a_refused_export_leaves_the_folder_alone(served, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def refuse(*args):
        raise OSError("disk full")

    monkeypatch.setattr(export, "write_manifest", refuse)
    with pytest.raises(CheckpointError, match="disk full"):
        ee.export_onnx(served, copy, forms=["layers"])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_int8_gets_thresholds_of_its_own_and_says_what_changed(served, labelled, tmp_path):
    rows, labels = labelled
    changed = ee.export_onnx(served, tmp_path, int8=True, rows=rows, labels=labels)
    small = ee.OnnxClassifier.from_pretrained(tmp_path)
    assert small.exit_policy == changed.result.policy != served.exit_policy
    assert small.operating_points == ("exact",)
    assert parse_target(changed.result.target) == TARGET
    answers = ee.predict(small, rows)
    assert float(answers.exit_layer.double().mean()) == pytest.approx(changed.after.mean_layers)
    right = answers.logits.argmax(-1) == torch.tensor(labels)
    assert float(right.double().mean()) == pytest.approx(changed.after.quality)
    assert float(ee.predict(served, rows).exit_layer.double().mean()) == pytest.approx(changed.before.mean_layers)
    small.set_exit_policy(served.exit_policy)
    assert float(ee.predict(small, rows).exit_layer.double().mean()) == pytest.approx(changed.unchanged.mean_layers)
    session = ort.InferenceSession(tmp_path / "model.onnx")
    alone = [session.run(["exit_layer"], feeds(row))[0][0] for row in rows]
    assert np.array_equal(alone, answers.exit_layer)
    assert "int8, new thresholds" in str(changed)
    assert json.loads((tmp_path / MANIFEST).read_text())["calibration"]["num_rows"] == 300


def test_thresholds_of_the_model_are_not_for_int8(served, labelled, tmp_path):
    rows, labels = labelled
    ee.export_onnx(served, tmp_path, int8=True, forms=["layers"])
    small = ee.OnnxClassifier.from_pretrained(tmp_path)
    assert small.exit_policy is None
    trace = ee.collect_trace(served, rows, labels=labels, progress=False)
    with pytest.raises(CheckpointError, match=r"chosen on (a|another) model"):
        small.set_exit_policy(ee.calibrate(trace, "confidence", keep_weak_exits=True))
    own = ee.collect_trace(small, rows, labels=labels, progress=False)
    assert own.meta["dtype"] == "int8"
    small.set_exit_policy(ee.calibrate(own, "confidence", keep_weak_exits=True))


def test_a_promise_goes_along_only_where_it_holds(served, labelled, tmp_path):
    rows, labels = labelled
    trace = ee.collect_trace(served, rows, labels=labels, progress=False)
    former, target = served.exit_policy, Certified(0.4, 0.9, risk="harm")
    try:
        served.set_exit_policy(ee.calibrate(trace, "confidence", target, keep_weak_exits=True))
        ee.export_onnx(served, tmp_path / "same", forms=["layers"])
        same = ee.OnnxClassifier.from_pretrained(tmp_path / "same")
        assert same.config.exit_certificate["promise"]["num_rows"] == 240
        changed = ee.export_onnx(served, tmp_path / "int8", int8=True, rows=rows, labels=labels, forms=["layers"])
        small = ee.OnnxClassifier.from_pretrained(tmp_path / "int8")
        assert changed.result.promise is not None
        assert changed.result.dtype == small.config.exit_certificate["dtype"] == "int8"
        assert small.config.exit_certificate["promise"] == changed.result.promise.to_dict()
        assert small.config.exit_certificate["fingerprint"] != same.config.exit_certificate["fingerprint"]
        narrow = dataclasses.replace(ee.calibrate(trace, "confidence", target, keep_weak_exits=True), dtype="bfloat16")
        served.set_exit_policy(narrow)
        ee.export_onnx(served, tmp_path / "narrow", forms=["layers"])
        other = ee.OnnxClassifier.from_pretrained(tmp_path / "narrow")
        assert other.exit_policy == narrow.policy
        assert other.config.exit_certificate["promise"] is None
    finally:
        served.set_exit_policy(former)


def test_learned_policies_learn_anew(served, labelled, tmp_path, traced, monkeypatch):
    rows, labels = labelled
    trace = ee.collect_trace(served, rows, labels=labels, progress=False)
    former = served.exit_policy
    try:
        served.set_exit_policy(ee.calibrate(trace, "beem-a", TARGET, options={"decay": 0.5}, keep_weak_exits=True))
        changed = ee.export_onnx(served, tmp_path, int8=True, rows=rows, labels=labels, forms=["layers"])
        assert changed.result.policy.decay == 0.5
        assert changed.result.num_learning_rows == 60
    finally:
        served.set_exit_policy(former)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forms": []}, "expected some of one-file, layers"),
        ({"forms": ["two-files"]}, "expected some of one-file, layers"),
        ({"int8": True}, "pass held-back rows"),
        ({"rows": [{"input_ids": [5]}]}, "rows are for int8"),
    ],
)
def test_contradictions_are_refused(served, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        ee.export_onnx(served, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_policy_or_in_another_dtype_is_refused(tiny_model, tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UsageError, match="no exit policy"):
        ee.export_onnx(tiny_model(), tmp_path / "out")
    with pytest.raises(UsageError, match="float32 on the CPU"):
        ee.export_onnx(tiny_model().bfloat16(), tmp_path / "out", forms=["layers"])


def test_one_file_alone_has_no_layers_for_python(served, tmp_path):
    ee.export_onnx(served, tmp_path, forms=["one-file"])
    with pytest.raises(UsageError, match="holds no layers"):
        ee.OnnxClassifier.from_pretrained(tmp_path)


def test_an_unknown_target_form_is_refused():
    for target in (ee.MaxDrop(0.01, 1.0), ee.FinalLayerError(paired=False, a=(1.0, 2.0))):
        assert str(parse_target(str(target))) == str(target)
    for text in ("MaxDrop(drop=__import__('os'))", "MaxDrop(0.1", "MaxDrop(depth=1)"):
        with pytest.raises((ee.EarlyExitError), match="MaxDrop"):
            parse_target(text)


def test_the_command_exports_and_predicts(served, labelled, tmp_path, tokenizer, random_texts, capsys):
    ee.save(served, tmp_path / "model", tokenizer=tokenizer, card=False)
    texts = random_texts(60)
    labels = ee.predict(served, texts, tokenizer=tokenizer).logits.argmax(-1).tolist()
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"text": texts, "label": labels}).to_csv(str(tmp_path / "data" / "validation.csv"))
    words = ["export", "onnx", str(tmp_path / "model"), str(tmp_path / "int8"), "--int8", "true"]
    assert main(words) == 2
    assert "pass held-back rows" in capsys.readouterr().err
    assert main([*words, "--dataset", str(tmp_path / "data"), "--target", "layer-budget:3"]) == 0
    assert "int8, new thresholds" in capsys.readouterr().out
    assert main([*words, "--scale_split", "train"]) == 2
    assert "pass --dataset" in capsys.readouterr().err
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    assert main(["predict", str(tmp_path / "int8"), "--input", str(tmp_path / "texts.txt")]) == 0
    told = [json.loads(line)["exit_layer"] for line in capsys.readouterr().out.splitlines()]
    small = ee.OnnxClassifier.from_pretrained(tmp_path / "int8")
    assert told == ee.predict(small, texts, tokenizer=tokenizer).exit_layer.tolist()
    Dataset.from_dict({"text": random_texts(50, seed=9)}).to_csv(str(tmp_path / "data" / "train.csv"))
    words[3] = str(tmp_path / "static")
    data = ["--dataset", str(tmp_path / "data"), "--scale_split", "train[:40]", "--target", "layer-budget:3"]
    assert main([*words, *data]) == 0
    assert "int8 by fixed scales" in capsys.readouterr().out
    assert ee.OnnxClassifier.from_pretrained(tmp_path / "static").form == "onnx-int8-static"
    assert main(["export", "openvino", "a", "b"]) == 2
    assert "expected onnx" in capsys.readouterr().err


def test_a_policy_that_cannot_be_traced_serves_in_the_layers_form_only(served, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "policy_graph", lambda *args: (_ for _ in ()).throw(PolicyError("cannot be exported")))
    with pytest.raises(PolicyError):
        ee.export_onnx(served, tmp_path / "out")
    ee.export_onnx(served, tmp_path / "out", forms=["layers"])
    assert ee.OnnxClassifier.from_pretrained(tmp_path / "out").exit_policy == served.exit_policy
