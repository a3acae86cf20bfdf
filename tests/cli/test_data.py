"""train, calibrate, evaluate and report on files as people have them: labels in words, columns by any name, any split."""

import json
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, BertModel

import hf_earlyexit as ee
from hf_earlyexit.cli.evaluate import judgement
from hf_earlyexit.cli.main import main
from tests.conftest import SHAPE
from tests.hub.toy import calibrate, make_model, make_tokenizer, texts

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["--max_steps", "1", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("data") / "bert"
    torch.manual_seed(0)
    BertModel(tiny_config()).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "model_type": "bert", "architectures": ["BertModel"]}))
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model of three named classes with a calibrated policy."""
    folder = tmp_path_factory.mktemp("served") / "model"
    model = make_model(id2label={0: "bad", 1: "fair", 2: "good"}, label2id={"bad": 0, "fair": 1, "good": 2})
    result = calibrate(model, (2.5,))[0]
    model.set_exit_policy(result)
    ee.save(model, folder, tokenizer=make_tokenizer(), calibration=result, card=False)
    return str(folder)


def table(path, labels, count=24, text="text", label="label", **more):
    rows = {text: texts(count), label: [labels[row % len(labels)] for row in range(count)], **more}
    frame, form = pandas.DataFrame(rows), path.suffix
    path.parent.mkdir(parents=True, exist_ok=True)
    if form in (".csv", ".tsv"):
        frame.to_csv(path, index=False, sep="," if form == ".csv" else "\t")
    else:
        frame.to_json(path, orient="records", lines=True)
    return str(path)


def train(bert, data, out, *words):
    return main(["train", bert, "--dataset", data, "--output_dir", str(out), "--held_back", "0.5", *QUIET, *words])


@pytest.mark.parametrize(
    ("form", "labels", "words", "names"),
    [
        ("csv", ["pos", "neg"], [], ["neg", "pos"]),
        ("csv", ["pos", "neg"], ["--label_names", "pos", "neg"], ["pos", "neg"]),
        ("tsv", [0, 1], ["--label_names", "bad", "good"], ["bad", "good"]),
        ("jsonl", [True, False], [], ["False", "True"]),
        ("csv", [1, 2, 3], ["--label_names", "1", "2", "3"], ["1", "2", "3"]),
        ("csv", ["0.0", "1.0"], [], ["LABEL_0", "LABEL_1"]),
    ],
)
def test_names_of_labels_travel_to_the_model(bert, tmp_path, capsys, form, labels, words, names):
    assert train(bert, table(tmp_path / f"rows.{form}", labels), tmp_path / "out", *words) == 0
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.id2label == dict(enumerate(names))
    assert config.label2id == {name: number for number, name in enumerate(names)}
    assert ("taken as classes" in capsys.readouterr().err) == (labels == ["0.0", "1.0"])
    trace = ee.ExitTrace.load(tmp_path / "out" / "held-back.safetensors")
    assert trace.problem_type == "single_label_classification"
    assert int(trace.labels.max()) == len(names) - 1


def test_values_and_several_labels(bert, tmp_path):
    assert train(bert, table(tmp_path / "a.csv", [0.5, 1.0, 3.0]), tmp_path / "values") == 0
    assert ee.ExitTrace.load(tmp_path / "values" / "held-back.safetensors").problem_type == "regression"
    words = ["--label_names", "a", "b", "c"]
    assert train(bert, table(tmp_path / "b.jsonl", [[0, 1, 1], [1, 0, 0]]), tmp_path / "many", *words) == 0
    config = json.loads((tmp_path / "many" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["a", "b", "c"]
    words = ["--problem_type", "regression"]
    assert train(bert, table(tmp_path / "c.csv", [1, 2, 5]), tmp_path / "stars", *words) == 0
    assert ee.ExitTrace.load(tmp_path / "stars" / "held-back.safetensors").problem_type == "regression"


def test_columns_are_chosen_and_splits_may_differ(bert, tmp_path):
    """A column called text that is none, a second split with other columns, its classes numbered by other words."""
    table(tmp_path / "d" / "train.csv", ["pos", "neg"], text="body", label="mood", **{"sentence": ["no"] * 24})
    table(tmp_path / "d" / "dev.tsv", ["neg", "pos"], count=10, text="body", label="mood")
    words = ["--text_column", "body", "--label_column", "mood", "--held_back", "validation[:8]", "--max_rows", "20"]
    assert train(bert, str(tmp_path / "d"), tmp_path / "out", *words) == 0
    trace = ee.ExitTrace.load(tmp_path / "out" / "held-back.safetensors")
    assert trace.labels.tolist() == [0, 1] * 4
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    served = ee.predict(model, texts(10)[:8], tokenizer=AutoTokenizer.from_pretrained(tmp_path / "out"))
    torch.testing.assert_close(served.logits, trace.logits[:, -1])


def test_texts_are_served_with_the_length_they_were_trained_with(bert, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "w5 " * 30 + "w9", "label": row % 2}) + "\n" for row in range(8))
    )
    assert train(bert, str(tmp_path / "rows.jsonl"), tmp_path / "out", "--max_length", "8") == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    trace = ee.ExitTrace.load(tmp_path / "out" / "held-back.safetensors")
    served = ee.predict(model, ["w5 " * 30 + "w9"], tokenizer=tokenizer)
    torch.testing.assert_close(served.logits[0], trace.logits[0, -1])
    assert len(tokenizer("w5 " * 30, truncation=True)["input_ids"]) == 8


@pytest.mark.parametrize(
    ("labels", "words", "message"),
    [
        (["a", None], [], "Row 1 has the label ''"),
        ([0, -1], [], "Row 1 has the label -1"),
        ([1.0, 2.0], [], "--problem_type"),
        ([1, 2], [], "--label_names 1 2"),
        (["a", "b"], ["--label_column", "stars"], "No column 'stars' among text, label"),
        (["a", "b"], ["--label_names", "a"], "Row 1 has the label 'b'"),
        (["a", "b"], ["--text_column", "body"], "has no column 'body'"),
        (["a", "b"], ["--text_column", "a", "b", "c"], "expected one, or two for pairs"),
        (["a", "b"], ["--problem_type", "classes"], "expected one of single_label"),
    ],
)
def test_rows_that_teach_nothing_are_refused_in_words(bert, tmp_path, capsys, labels, words, message):
    assert train(bert, table(tmp_path / "rows.csv", labels), tmp_path / "out", *words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert message in told
    assert told.startswith("hf-earlyexit train: ")


def test_texts_that_are_missing_are_refused_by_row(bert, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"text": "w5", "label": 0}\n{"text": null, "label": 1}\n')
    assert train(bert, str(tmp_path / "rows.jsonl"), tmp_path / "out") == 2
    assert "Row 1 of" in capsys.readouterr().err


def evaluated(capsys, *words):
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_labels_by_name_and_by_number_judge_alike(served, tmp_path, capsys):
    found = [
        evaluated(capsys, served, "--dataset", table(tmp_path / f"{number}.{form}", labels), *words)
        for number, (form, labels, words) in enumerate(
            [
                ("csv", ["good", "bad", "fair"], []),
                ("tsv", [2, 0, 1], []),
                ("jsonl", ["Good", "BAD", "fair"], []),
                ("csv", ["gut", "schlecht", "mittel"], ["--label_names", "schlecht", "mittel", "gut"]),
            ]
        )
    ]
    assert found[1:] == found[:1] * 3


def test_evaluate_says_whether_the_target_was_kept_and_what_a_cut_model_does(served, tmp_path, capsys):
    model, rows = ee.EarlyExitBertForSequenceClassification.from_pretrained(served), texts(90)
    labels = ee.predict(model, rows, tokenizer=make_tokenizer(), early_exit=False).logits.argmax(-1).tolist()
    pandas.DataFrame({"text": rows, "label": labels}).to_csv(tmp_path / "rows.csv", index=False)
    found = evaluated(capsys, served, "--dataset", tmp_path / "rows.csv", "--metric", "accuracy")
    verdict, static = found["target"], found["static"]
    assert verdict["target"] == "LayerBudget(layers=2.5)"
    assert verdict["margin"] == pytest.approx(2.5 - found["mean_layers"])
    assert verdict["kept"] == (found["mean_layers"] <= 2.5)
    assert verdict["standard_error"] > 0
    assert static["layer"] == 3 if found["mean_layers"] > 2 else 2
    trace = ee.collect_trace(model, rows, tokenizer=make_tokenizer(), labels=labels, progress=False)
    assert static["quality"] == pytest.approx(float(trace.quality[:, static["layer"] - 1].mean()))
    assert static["gain"] == pytest.approx(found["quality"] - static["quality"])
    assert main(["evaluate", served, "--dataset", str(tmp_path / "rows.csv")]) == 0
    told = capsys.readouterr().out
    assert "target LayerBudget(layers=2.5): " in told
    assert f"a model cut off after layer {static['layer']} reaches" in told


@pytest.mark.parametrize(
    ("margin", "error", "words"),
    [(0.02, 0.01, "kept on these rows (0.0200 quality to spare, standard error 0.0100)"),
     (0.005, 0.01, "kept on these rows (0.0050 quality to spare, standard error 0.0100; other rows may well miss it)"),
     (-0.015, 0.01, "not kept on these rows (0.0150 quality beyond it, standard error 0.0100; so little may be chance)"),
     (-0.05, 0.01, "not kept on these rows (0.0500 quality beyond it, standard error 0.0100)")],
)  # fmt: skip
def test_a_verdict_in_words(margin, error, words):
    verdict = {"target": "T", "kept": margin >= 0, "margin": margin, "standard_error": error, "unit": "quality"}
    assert judgement(verdict) == f"target T: {words}"


def test_calibrate_and_report_take_the_same_flags(served, tmp_path, capsys):
    data = table(tmp_path / "rows.tsv", ["good", "bad", "fair"], count=90, text="body", label="mood")
    words = [
        "--dataset",
        data,
        "--text_column",
        "body",
        "--label_column",
        "mood",
        "--split",
        "train[:60]",
        "--device",
        "cpu",
    ]
    point = ["--target", "layer-budget:2.5", "--keep_weak_exits", "--operating_point", "mine"]
    assert main(["calibrate", served, *words, *point]) == 0
    assert "on 60 rows" in capsys.readouterr().out
    assert main(["report", served, *words, "--output", str(tmp_path / "report.html")]) == 0
    assert "on 30 rows" in capsys.readouterr().out


def test_commands_that_need_no_extra_do_without_it(served, tmp_path):
    """With the README's install, without matplotlib: save and push write the card; report names the extra that it needs."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "onnx", "onnxscript")))
import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.hub import push
from hf_earlyexit.hub.save import load_calibrations
model = ee.EarlyExitBertForSequenceClassification.from_pretrained({served!r})
ee.save(model, {str(tmp_path / "saved")!r}, calibration=load_calibrations({served!r}))
class Api:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): raise OSError("no Hub here")
push.HfApi = Api
assert main(["push", {served!r}, "--repo_id", "a/b"]) == 2
assert main(["report", {served!r}, "--trace", "x"]) == 2
assert main(["export", "onnx", {served!r}, {str(tmp_path / "onnx")!r}]) == 2
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "saved" / "README.md").is_file()
    assert "no Hub here" in done.stderr
    assert (
        'hf-earlyexit report: matplotlib is missing, which this needs; run: pip install "hf_earlyexit[report]"'
        in done.stderr
    )
    assert '"hf_earlyexit[onnx]"' in done.stderr
