"""One model in every form: with thresholds of the form, by measurement, and refused where there are none."""

from itertools import groupby

import pytest
import torch

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, UnknownNameError, UsageError
from hf_earlyexit.forms import convert as convert_module
from hf_earlyexit.forms import speed, table
from hf_earlyexit.forms.speed import fastest
from hf_earlyexit.forms.table import FORMS, what_lacks
from hf_earlyexit.onnx import graphs
from hf_earlyexit.serving.bf16 import lacks_bf16
from hf_earlyexit.serving.online import Engine

OTHERS = [
    "int8",
    pytest.param(
        "bf16",
        marks=pytest.mark.skipif(
            lacks_bf16(torch.device("cpu")) is not None, reason="this processor has no instructions for bfloat16"
        ),
    ),
]


@pytest.fixture(scope="module")
def rows(random_texts):
    return random_texts(400)


@pytest.fixture(scope="module")
def model(tiny_model, tokenizer, rows):
    model = tiny_model()
    labels = ee.predict(model, rows, tokenizer=tokenizer).logits.argmax(-1).tolist()
    trace = ee.collect_trace(model, rows, tokenizer=tokenizer, labels=labels, progress=False)
    model.set_exit_policy(ee.calibrate(trace, "confidence", ee.MaxDrop(0.3), keep_weak_exits=True))
    model.labels = labels
    return model


@pytest.fixture(scope="module")
def converted(model, tokenizer, rows):
    """`converted(form)`: with thresholds chosen anew, made once."""
    known = {}

    def make(form):
        if form not in known:
            again = {} if form in ("fp32", "onnx") else {"rows": rows, "labels": model.labels, "tokenizer": tokenizer}
            known[form] = ee.convert(model, form, **again)
        return known[form]

    return make


@pytest.mark.parametrize("form", ["fp32", *OTHERS, "onnx", "onnx-int8"])
def test_every_form_serves_what_was_calibrated_on_it_and_says_so(converted, model, tokenizer, rows, form):
    one = converted(form)
    assert (one is model) == (form == "fp32")
    trace = ee.collect_trace(one, rows, tokenizer=tokenizer, labels=model.labels, progress=False)
    certificate = one.config.exit_certificate
    assert certificate["fingerprint"] == trace.fingerprint
    assert (certificate["fingerprint"] == model.config.exit_certificate["fingerprint"]) == (form in ("fp32", "onnx"))
    assert certificate["target"] == model.config.exit_certificate["target"]
    answers, replayed = ee.predict(one, rows, tokenizer=tokenizer), ee.replay(one.exit_policy, trace)
    assert answers.form == form
    assert answers.exit_layer.float().mean() == pytest.approx(replayed.mean_layers, abs=0.006)  # a row or two at a threshold
    assert len(answers.exit_layer.unique()) > 1
    with torch.inference_mode():
        full = ee.predict(one, rows, tokenizer=tokenizer, early_exit=False).logits
        apart = (full - ee.predict(model, rows, tokenizer=tokenizer, early_exit=False).logits).abs().max()
    assert (apart <= 1e-4) == (form in ("fp32", "onnx"))
    assert apart < 0.5
    assert ee.pipeline(model=one, tokenizer=tokenizer)(rows[:3])[0]["exit_layer"] == int(answers.exit_layer[0])
    with Engine(one, tokenizer=tokenizer) as engine:
        assert engine.submit(rows[0]).result().exit_layer == int(answers.exit_layer[0])


def test_thresholds_of_other_numbers_are_not_taken_silently(model, converted):
    for form in ("int8", "onnx-int8"):
        with pytest.raises(UsageError, match=rf"chosen in fp32 and do not hold in {form}, .* pass rows=.*--form {form}"):
            ee.convert(model, form)
    with pytest.raises(UsageError, match="rows choose thresholds anew, and 'onnx' computes in float32"):
        ee.convert(model, "onnx", rows=["w5"])
    with pytest.raises(UsageError, match=r"model is int8 on cpu; bf16 needs float32|'bf16' does not run here"):
        ee.convert(converted("int8"), "bf16")


@pytest.mark.parametrize("form", ["int8", "onnx", "onnx-int8"])
def test_a_model_in_another_form_has_that_form_only(converted, form):
    one = converted(form)
    for hint in ("throughput", "latency"):
        assert ee.convert(one, form, performance_hint=hint) is ee.convert(one, performance_hint=hint) is one
    with pytest.raises(UsageError, match=f"The model is in {form}, and float32 is not to be had of it"):
        ee.convert(one, "fp32")


def test_a_model_without_thresholds_needs_none(tiny_model, tokenizer):
    small = ee.convert(tiny_model(), "int8")
    assert small.exit_policy is None
    answers = ee.predict(small, ["w5 w6"], tokenizer=tokenizer)
    assert (answers.form, answers.exit_layer.tolist()) == ("int8", [4])


@pytest.mark.parametrize("form", OTHERS)
def test_kept_thresholds_are_saved_found_and_held_to_the_model(model, converted, tokenizer, rows, form, tmp_path):
    own = dict(model.config.exit_forms or {})
    ee.keep_thresholds(model, converted(form))
    model.save_pretrained(tmp_path)
    model.config.exit_forms = own or None
    loaded = ee.from_pretrained(tmp_path)
    assert loaded.exit_policy == model.exit_policy
    again = ee.convert(loaded, form)
    assert again.exit_policy == converted(form).exit_policy != model.exit_policy
    assert again.config.exit_certificate == converted(form).config.exit_certificate
    layers = [ee.predict(one, rows, tokenizer=tokenizer).exit_layer.tolist() for one in (again, converted(form))]
    assert layers[0] == layers[1]
    pipe = ee.pipeline(model=str(tmp_path), tokenizer=tokenizer, form=form)
    assert {answer["form"] for answer in pipe(rows[:2]) + pipe(rows[:2], batch_size=2)} == {form}
    assert "form" not in ee.pipeline(model=str(tmp_path), tokenizer=tokenizer)(rows[0])[0]
    with torch.no_grad():
        loaded.base_model.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(CheckpointError, match=f"kept for {form} were chosen on other numbers"):
        ee.convert(loaded, form)
    loaded = ee.from_pretrained(tmp_path)
    loaded.config.exit_forms[form]["policy"] = loaded.exit_policy.to_dict()
    with pytest.raises(CheckpointError, match=f"kept for {form} were chosen on other numbers"):
        ee.convert(loaded, form)
    loaded.config.exit_forms[form]["certificate"]["num_rows"] = 1
    with pytest.raises(EarlyExitConfigError, match="exit_forms"):
        loaded.config.check_exits()


def test_only_what_a_calibration_vouches_for_is_kept(model, tiny_model):
    bare = ee.quantize_int8(model)
    for policy in (None, model.exit_policy):
        bare.set_exit_policy(policy)
        with pytest.raises(UsageError, match="no thresholds that a calibration vouches for"):
            ee.keep_thresholds(tiny_model(), bare)
    with pytest.raises(UsageError, match="The model is in fp32"):
        ee.keep_thresholds(tiny_model(), model)


def test_auto_measures_the_forms_that_have_thresholds(model, converted, monkeypatch):
    measured = []
    monkeypatch.setattr(convert_module, "fastest", lambda models, hint: measured.append((hint, *models)) or model)
    monkeypatch.setattr(convert_module, "made", lambda model, form: model)
    monkeypatch.setattr(convert_module, "_take_kept", lambda model, new: None)
    monkeypatch.setattr(convert_module, "what_lacks", lambda form, device: "a test" if form == "bf16" else None)
    assert ee.convert(model) is ee.convert(model, performance_hint="latency") is model
    monkeypatch.setattr(model.config, "exit_forms", {"int8": {}, "bf16": {}, "onnx-int8": {}})
    ee.convert(model)
    ee.convert(model, "auto", performance_hint="latency")
    assert measured == [
        ("throughput", "fp32"),
        ("latency", "fp32", "onnx"),
        ("throughput", "fp32", "int8", "onnx-int8"),
        ("latency", "fp32", "int8", "onnx", "onnx-int8"),
    ]


@pytest.mark.parametrize("form", ["onnx", "onnx-int8"])
def test_for_latency_a_row_that_comes_alone_has_a_file_of_its_own(model, converted, tokenizer, rows, form):
    several = converted(form)
    chosen = {} if form == "onnx" else {"rows": rows, "labels": model.labels, "tokenizer": tokenizer}
    quick = ee.convert(model, form, performance_hint="latency", **chosen)
    assert several.walker.one_row is None
    asked, one_row = [], quick.walker.one_row
    quick.walker.one_row = lambda row: asked.append(row) or one_row(row)
    quick.walker.one_row.policy = one_row.policy
    right = ee.predict(several, rows[:50], tokenizer=tokenizer)
    told = [ee.predict(quick, [row], tokenizer=tokenizer) for row in rows[:50]]
    assert len(asked) == 50
    assert [int(one.exit_layer) for one in told] == right.exit_layer.tolist()
    assert torch.allclose(torch.cat([one.logits for one in told]), right.logits, atol=1e-5)
    assert len(set(right.exit_layer.tolist())) > 1


def test_a_model_too_large_for_one_file_goes_through_the_layers_and_says_so(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(convert_module.logger, "warning", warnings.append)
    monkeypatch.setattr(graphs, "LARGEST_FILE", 1000)
    assert ee.convert(model, "onnx", performance_hint="latency").walker.one_row is None
    assert len(warnings) == 1
    assert warnings[0].startswith(
        "Rows that come alone go through the files of the layers, one after the other: The model takes"
    )


def test_auto_leaves_out_what_the_model_cannot_have_and_says_so(model, converted, monkeypatch):
    def fails(given, form):
        if form == "onnx":
            raise UsageError("it cannot be exported: a test", field="model")
        return given if form == "fp32" else ee.quantize_int8(given)

    warnings = []
    stale = {"int8": {"policy": model.config.exit_policy, "certificate": model.config.exit_certificate}}
    monkeypatch.setattr(convert_module, "made", fails)
    monkeypatch.setattr(convert_module, "what_lacks", lambda form, device: "a test" if form == "bf16" else None)
    monkeypatch.setattr(model.config, "exit_forms", stale)
    monkeypatch.setattr(convert_module.logger, "warning", warnings.append)
    assert ee.convert(model, performance_hint="latency") is model
    assert [text.split(":")[0] for text in warnings] == [
        "The form int8 is left out of the choice",
        "The form onnx is left out of the choice",
    ]
    with pytest.raises(UsageError, match="it cannot be exported"):
        ee.convert(model, "onnx")


@pytest.mark.parametrize("hint", ["throughput", "latency"])
def test_the_fastest_is_the_one_that_takes_the_least_time(model, monkeypatch, hint):
    now, asked, in_a_turn = [0.0], [], 1 if hint == "throughput" else 4

    def answer(one, batch, early_exit):
        asked.append((one, len(batch)))
        assert early_exit is False
        now[0] += {"slow": 3, "fast": 1, "first turn": 2 if asked.count((one, len(batch))) > in_a_turn else 0}[one]

    monkeypatch.setattr(speed, "predict", answer)
    monkeypatch.setattr(speed, "made_up_rows", lambda one, count: [{}] * count)
    names = {name: name for name in ("slow", "fast", "first turn")}
    assert fastest(names, hint, clock=lambda: now[0]) == "fast"
    assert {count for _, count in asked} == {16 if hint == "throughput" else 1}
    assert all(len(list(same)) % in_a_turn == 0 for _, same in groupby(asked))  # rows of a model follow one another
    asked.clear()
    assert fastest({"slow": "slow"}, hint) == "slow"
    assert not asked


def test_made_up_rows_are_read_by_texts_and_pictures(model, converted):
    assert fastest({"fp32": model, "onnx": converted("onnx")}, "throughput") in (model, converted("onnx"))
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    pictures = ee.EarlyExitViTForImageClassification(ee.EarlyExitViTConfig(image_size=16, patch_size=8, **shape)).eval()
    assert len(ee.predict(pictures, speed.made_up_rows(pictures, speed.ROWS)).logits) == speed.ROWS


def test_a_form_that_does_not_run_here_is_refused_with_what_it_lacks(model, monkeypatch):
    assert "for CPUs, and the model is on cuda" in what_lacks("int8", torch.device("cuda"))
    assert what_lacks("bf16", torch.device("cuda")) is None
    monkeypatch.setattr("hf_earlyexit.serving.bf16._supported", lambda: False)
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    for form, lacking in (("bf16", "no instructions for bfloat16"), ("onnx", 'needs the extra "onnx"')):
        with pytest.raises(UsageError, match=f"{form!r} does not run here: .*{lacking}"):
            ee.convert(model, form)
    with pytest.raises(UnknownNameError, match="int8"):
        ee.convert(model, "int9")
    with pytest.raises(UnknownNameError, match="latency"):
        ee.convert(model, performance_hint="latence")
    assert set(FORMS) == {"fp32", "bf16", "int8", "onnx", "onnx-int8"}
