"""`hf-earlyexit calibrate --every`: an exit every so many layers, as told or as is fastest."""

import json
from pathlib import Path

import pytest

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.measuring import spacing
from hf_earlyexit.onnx.recalibrate import recalibrate
from tests.hub.toy import make_model, make_tokenizer, texts

WORDS = ["--target", "max-drop:0.3", "--keep_weak_exits"]


@pytest.fixture
def folder(tmp_path):
    model, tokenizer = make_model(), make_tokenizer()
    ee.save(model, tmp_path / "model", tokenizer=tokenizer, card=False)
    trace = ee.collect_trace(model, texts(200), tokenizer=tokenizer, labelled=False, split="held-back", progress=False)
    trace.save(tmp_path / "model" / "held-back.safetensors")
    return str(tmp_path / "model")


def muted(folder):
    return json.loads(Path(folder, "config.json").read_text())["exit_policy"]["muted"]


def test_a_number_of_layers(folder):
    assert main(["calibrate", folder, *WORDS, "--every", "2"]) == 0
    assert muted(folder) == [0, 2]
    assert main(["calibrate", folder, *WORDS]) == 0
    assert muted(folder) == []


@pytest.mark.parametrize("hint", ["throughput", "latency"])
def test_the_fastest_number_is_measured_as_it_was_asked_for(folder, hint, monkeypatch, capsys):
    asked = []

    def costs(model, policy, performance_hint, clock):
        asked.append((performance_hint, type(model).__name__))
        return spacing.StepCosts(0.0, 2e-6, 1.0)

    monkeypatch.setattr(spacing, "measure_step_costs", costs)
    assert main(["calibrate", folder, *WORDS, "--every", "auto", "--performance_hint", hint]) == 0
    assert asked == [(hint, "EarlyExitBertForSequenceClassification")]
    trace = ee.ExitTrace.load(f"{folder}/held-back.safetensors")
    found = spacing.space_exits(ee.from_pretrained(folder), trace, target="max-drop:0.3", keep_weak_exits=True)
    assert found.every > 1
    assert muted(folder) == list(found.result.policy.muted)
    assert (
        f"an exit every {found.every} layers: a layer takes 2 us of a row here, an exit 1000000 us"
        in capsys.readouterr().out
    )


def test_what_is_neither_is_refused(folder, capsys):
    for words, message in (
        (["--every", "often"], "every is 'often'; expected a whole number of layers, or auto"),
        (["--every", "0"], "every is 0; expected a whole number"),
        (["--every", "auto", "--performance_hint", "speed"], "performance hint"),
        (["--every", "2", "--performance_hint", "latency"], "it is for --every auto"),
        (["--performance_hint", "latency"], "it is for --every auto"),
    ):
        assert main(["calibrate", folder, *WORDS, *words]) != 0
        assert message in capsys.readouterr().err


def test_thresholds_for_another_form_keep_to_the_exits(folder):
    """Also of a rule that learns anew on that form."""
    model, tokenizer, rows = ee.from_pretrained(folder), make_tokenizer(), texts(200)
    labels = ee.predict(model, rows, tokenizer=tokenizer, early_exit=False).logits.argmax(-1).tolist()
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    for name in ("confidence", "beem-calibrated", "beem-a"):
        model.set_exit_policy(ee.calibrate(trace, name, "max-drop:0.3", every=2, keep_weak_exits=True))
        small = ee.quantize_int8(model)
        recalibrate(model, small, rows, None, tokenizer=tokenizer, labels=labels, progress=False)
        assert small.exit_policy.muted == (0, 2)
        assert small.exit_policy.may_leave
