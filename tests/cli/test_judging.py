"""evaluate, explain, report and env: what they print is what the model does."""

import getpass
import json
import socket

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_model, tokenizer, open_policy, random_texts):
    """A model with a policy, one without, and a data set."""
    folder = tmp_path_factory.mktemp("judging")
    model = tiny_model()
    for name, policy in (("plain", None), ("model", open_policy(model, "confidence"))):
        model.set_exit_policy(policy)
        model.set_operating_points({"first": ee.policies.StaticPolicy.at(0, 4)})
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "data").mkdir()
    texts = random_texts(80)
    lines = ["text,label", *(f"{text},{row % 3}" for row, text in enumerate(texts))]
    (folder / "data" / "test.csv").write_text("\n".join(lines) + "\n")
    (folder / "data" / "validation.csv").write_text("\n".join(lines) + "\n")
    return folder


def run(capsys, *words):
    assert main([str(word) for word in words]) == 0
    return capsys.readouterr().out


def test_evaluate_tells_what_predict_does(places, capsys, tokenizer, random_texts):
    found = json.loads(run(capsys, "evaluate", "--model", places / "model", "--dataset", places / "data", "--json", "true"))
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(places / "model")
    labels = torch.arange(80) % 3
    early = ee.predict(model, random_texts(80), tokenizer=tokenizer)
    full = ee.predict(model, random_texts(80), tokenizer=tokenizer, early_exit=False)
    layers = early.exit_layer.double()
    assert found["quality"] == float((early.logits.argmax(-1) == labels).double().mean())
    assert found["full_quality"] == float((full.logits.argmax(-1) == labels).double().mean())
    assert found["mean_layers"] == float(layers.mean())
    assert found["layer_speed_up"] == pytest.approx(4 / float(layers.mean()))
    assert found["exit_shares"] == {str(layer): float((layers == layer).double().mean()) for layer in (1, 2, 3, 4)}
    assert sum(found["exit_shares"].values()) == pytest.approx(1)
    assert "time" not in found
    for label, report in enumerate(found["classes"]):
        own = labels == label
        assert report["num_rows"] == int(own.sum())
        assert report["recall"] == pytest.approx(float((early.logits.argmax(-1)[own] == label).double().mean()))
        assert report["full_recall"] == pytest.approx(float((full.logits.argmax(-1)[own] == label).double().mean()))
    told = run(capsys, "evaluate", "--model", places / "model", "--dataset", places / "data")
    assert "by class" in told
    assert any(line.startswith(model.config.id2label[2]) for line in told.splitlines())


def test_evaluate_measures_on_request(places, capsys):
    words = ["evaluate", "--model", places / "model", "--dataset", places / "data", "--time", "true", "--repeats", "2"]
    time = json.loads(run(capsys, *words, "--json", "true"))["time"]
    assert time["seconds"] > 0
    assert time["middle_half"][0] <= time["speed_up"] <= time["middle_half"][1]
    told = run(capsys, *words)
    assert "measured speed-up" in told
    assert "layer speed-up" in told


def test_explain_gives_the_reason_and_the_table(places, capsys, tokenizer):
    told = run(capsys, "explain", "--model", places / "model", "--text", "w9 w80")
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(places / "model")
    assert told.strip() == str(ee.explain(model, "w9 w80", tokenizer=tokenizer))
    values = json.loads(run(capsys, "explain", "--model", places / "model", "--text", "w9", "--json", "true"))
    assert len(values["exits"]) == 4
    assert values["exit_layer"] in (1, 2, 3, 4)


def test_report_from_a_data_set_and_from_a_trace_agree(places, capsys, tmp_path, tokenizer, random_texts):
    words = ["report", "--model", places / "model", "--dataset", places / "data"]
    told = run(capsys, *words, "--output", tmp_path / "one.html")
    assert "on 40 rows" in told
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(places / "model")
    labels = [row % 3 for row in range(80)]
    ee.collect_trace(model, random_texts(80), tokenizer=tokenizer, labels=labels).save(tmp_path / "trace.safetensors")
    run(capsys, *words, "--trace", tmp_path / "trace.safetensors", "--output", tmp_path / "two.html")
    one, two = ((tmp_path / name).read_text(encoding="utf-8") for name in ("one.html", "two.html"))
    assert one == two
    assert str(places) not in one


def test_an_operating_point_is_judged_in_place_of_the_default(places, capsys, tmp_path):
    named = ["--model", places / "plain", "--operating_point", "first"]
    found = json.loads(run(capsys, "evaluate", *named, "--dataset", places / "data", "--json", "true"))
    assert found["policy"] == "static"
    assert (found["mean_layers"], found["num_layers"]) == (1, 4)
    assert json.loads(run(capsys, "explain", *named, "--text", "w9", "--json", "true"))["exit_layer"] == 1
    run(capsys, "report", *named, "--dataset", places / "data", "--output", tmp_path / "report.html")
    assert "static, as served" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_env_names_versions_but_nobody(capsys):
    found = json.loads(run(capsys, "env", "--json", "true"))
    assert found["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["torch threads"] == torch.get_num_threads()
    assert "cpu" in found["devices"]
    told = run(capsys, "env")
    assert all(name in told for name in found)
    for private in (socket.gethostname(), getpass.getuser()):
        assert private not in told.split()


@pytest.mark.parametrize("command", ["train", "calibrate", "predict", "evaluate", "explain", "report", "env"])
def test_help_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"\n    hf-earlyexit {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--model", "{plain}", "--dataset", "{data}"], "no exit policy"),
        (["evaluate", "--model", "{model}", "--dataset", "{data}", "--split", "extra"], "it has test, validation"),
        (["evaluate", "--model", "{model}", "--dataset", "{data}", "--repeats", "0"], "expected a whole number from 1"),
        (["evaluate", "--model", "{model}", "--dataset", "{data}", "--operating_point", "frist"], "Did you mean 'first'"),
        (["evaluate", "--model", "{model}", "--dataset", "{data}", "--operating_point", "exact"], "nothing to compare"),
        (["explain", "--model", "{plain}", "--text", "w5"], "calibrate first"),
        (["explain", "--model", "{model}", "--text", "w5", "--operating_point", "exact"], "nothing to explain"),
        (["report", "--model", "{model}", "--dataset", "{data}", "--operating_point", "exact"], "name another"),
        (["report", "--model", "{model}"], "No rows"),
        (["report", "--model", "{model}", "--trace", "{trace}"], "this one has"),
        (["report", "--model", "{model}", "--trace", "nowhere"], "cannot be read"),
    ],
)
def test_mistakes_end_with_status_2_and_one_line(
    words, message, places, tmp_path, capsys, tiny_model, tokenizer, random_texts
):
    trace = ee.collect_trace(tiny_model(seed=7), random_texts(50), tokenizer=tokenizer, labels=[0] * 50)
    trace.save(tmp_path / "trace.safetensors")
    names = {name: places / name for name in ("model", "plain", "data")} | {"trace": tmp_path / "trace.safetensors"}
    assert main([word.format(**names) for word in words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert not any("Traceback" in line for line in told)
