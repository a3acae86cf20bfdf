"""`--form`: thresholds for a form are kept beside the model's, and whoever answers says in which form."""

import json

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.cli.predict import PredictArguments, run_of
from hf_earlyexit.forms import convert as convert_module
from hf_earlyexit.hub.save import load_calibrations
from hf_earlyexit.serving.bf16 import lacks_bf16
from tests.hub.toy import make_all, texts


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model folder with thresholds for int8, calibrated by the command, and files of rows."""
    folder = tmp_path_factory.mktemp("forms")
    made, tokenizer, results = make_all()
    ee.save(made, folder / "model", tokenizer=tokenizer, calibration=results, card=False)
    rows = texts(80)
    labels = ee.predict(made, rows, tokenizer=tokenizer, early_exit=False).logits.argmax(-1).tolist()
    (folder / "data").mkdir()
    (folder / "data" / "validation.csv").write_text(
        "\n".join(["text,label", *(f"{a},{b}" for a, b in zip(rows, labels, strict=True))])
    )
    (folder / "texts.csv").write_text("\n".join(["text,form", *(f"{text},oral" for text in texts(6))]) + "\n")
    before = load_calibrations(folder / "model")
    words = ["--dataset", str(folder / "data"), "--target", "max-drop:0.3", "--keep_weak_exits"]
    assert main(["calibrate", str(folder / "model"), *words, "--form", "int8"]) == 0
    assert load_calibrations(folder / "model") == before  # of the model's own policies
    return folder, words


def answered(capsys, *words):
    assert main(["predict", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def test_a_form_is_calibrated_kept_and_answers(places, capsys, monkeypatch):
    folder, _ = places
    capsys.readouterr()
    loaded = ee.from_pretrained(folder / "model")
    assert loaded.config.exit_forms["int8"]["certificate"]["dtype"] == "int8"
    small, tokenizer = ee.convert(loaded, "int8"), make_all()[1]
    right = ee.predict(small, texts(6), tokenizer=tokenizer).exit_layer.tolist()
    words = (folder / "model", "--input", folder / "texts.csv")
    rows = answered(capsys, *words, "--form", "int8")
    assert [row["exit_layer"] for row in rows] == right
    assert {(row["form"], row["input_form"]) for row in rows} == {("int8", "oral")}
    assert {row["form"] for row in answered(capsys, *words)} == {"oral"}  # nobody asked for a form
    best = {"latency": "int8", "throughput": "fp32"}
    monkeypatch.setattr(convert_module, "fastest", lambda models, hint: models[best[hint]])
    for hint, form in (("throughput", "fp32"), ("latency", "int8")):
        rows = answered(capsys, *words, "--form", "auto", "--performance_hint", hint)
        assert {row["form"] for row in rows} == {form}
    out = folder / "answers.jsonl"
    assert main(["predict", *map(str, words), "--output", str(out), "--form", "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["form"] == "int8"
    auto = PredictArguments(model="model", input="texts.csv", form="auto")
    assert run_of(auto, loaded) != run_of(auto, small)  # a stopped run does not go on in another form


def test_forms_that_cannot_be_are_refused(places, capsys, monkeypatch):
    folder, chosen = places
    model, served = str(folder / "model"), ["--input", str(folder / "texts.csv")]
    monkeypatch.setattr("hf_earlyexit.serving.bf16._supported", lambda: False)
    for words, message in (
        (
            ["predict", model, *served, "--form", "bf16"],
            "does not run here: this processor has no instructions for bfloat16",
        ),
        (["predict", model, *served, "--form", "onnx-int8"], "hf-earlyexit calibrate MODEL --form onnx-int8"),
        (["predict", model, *served, "--form", "int9"], "int8"),
        (["calibrate", model, *chosen, "--form", "fp32"], "its thresholds are the model's own"),
        (["calibrate", model, "--form", "int8"], "name rows for the form int8"),
        (["calibrate", model, *chosen, "--form", "int8", "--operating_point", "fast"], "A form has one policy"),
    ):
        assert main(words) != 0
        assert message in capsys.readouterr().err


def test_bf16_is_refused_or_served(places, capsys):
    folder, chosen = places
    able = lacks_bf16(torch.device("cpu")) is None
    assert (main(["calibrate", str(folder / "model"), *chosen, "--form", "bf16"]) == 0) == able
    capsys.readouterr()
    if able:
        rows = answered(capsys, folder / "model", "--input", folder / "texts.csv", "--form", "bf16")
        assert {row["form"] for row in rows} == {"bf16"}
        assert set(ee.from_pretrained(folder / "model").config.exit_forms) == {"int8", "bf16"}
