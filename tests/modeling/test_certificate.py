"""Thresholds are tied to the heads and the dtype they were chosen on."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError
from hf_earlyexit.modeling.certificate import is_certificate
from hf_earlyexit.modeling.fingerprint import model_fingerprint
from tests.hub.toy import calibrate, make_model
from tests.modeling.test_loading import HEAD_TENSOR, Door, edit_config, edit_weights
from tests.samples import learned_trace


@pytest.fixture(scope="module")
def results():
    return calibrate(make_model())


@pytest.fixture
def model(results):
    model = make_model()
    model.set_operating_points({"fast": results[0], "bare": ee.ConfidencePolicy(thresholds=[0.5] * 3)})
    model.set_exit_policy(results[1])
    return model


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path)
    return tmp_path


def heard(caplog, words):
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


def test_a_certificate_tells_heads_dtype_and_rows(model, results):
    certificate = model.config.exit_certificate
    assert certificate["fingerprint"] == results[1].fingerprint
    assert (certificate["dtype"], certificate["split"], certificate["num_rows"]) == ("float32", "held-back", 200)
    assert certificate["target"] == results[1].target
    assert set(model.config.exit_point_certificates) == {"fast"}


def test_a_bare_policy_has_none(model, results):
    model.set_exit_policy(results[1].policy)
    assert model.config.exit_certificate is None
    model.set_exit_policy(results[1])
    model.set_exit_policy(None)
    assert model.config.exit_certificate is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_thresholds_and_certificate_come_back_exactly_in_every_dtype(saved, model, caplog, dtype):
    loaded = AutoModel.from_pretrained(saved, dtype=dtype)
    for name in ("exit_policy", "exit_certificate", "exit_operating_points", "exit_point_certificates"):
        assert getattr(loaded.config, name) == getattr(model.config, name)
    warned = heard(caplog, f"was calibrated in float32, but the model is loaded in {dtype}")
    assert len(warned) == (0 if dtype == "float32" else 2)  # the default, and the point that has a certificate


def test_a_model_saved_in_a_narrower_dtype_is_still_the_one_that_was_calibrated(saved, tmp_path, model):
    AutoModel.from_pretrained(saved, dtype="bfloat16").save_pretrained(tmp_path / "narrow")
    for dtype in ("bfloat16", "float32"):
        assert AutoModel.from_pretrained(tmp_path / "narrow", dtype=dtype).exit_policy == model.exit_policy


def flip_a_bit(tensors):
    tensors[HEAD_TENSOR].view(torch.int32)[0, 0] ^= 1


@pytest.mark.parametrize("name", [HEAD_TENSOR, "classifier.bias"])
def test_other_heads_are_refused(saved, name):
    edit_weights(saved, lambda tensors: tensors[name].add_(0.5))
    with pytest.raises(CheckpointError, match=r"thresholds of the exit policy.*ignore_certificate=True") as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.field == "exit_certificate"
    assert caught.value.path == str(saved)


def test_a_single_bit_is_seen(saved):
    edit_weights(saved, flip_a_bit)
    with pytest.raises(CheckpointError, match="chosen on another model: its weights"):
        Door.from_pretrained(saved)


def test_a_new_config_beside_old_weights_is_refused(saved, tmp_path):
    other = make_model(seed=1)
    other.set_exit_policy(calibrate(other, [2.0])[0])
    other.save_pretrained(tmp_path / "other")
    (saved / "config.json").write_bytes((tmp_path / "other" / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="saved or edited in part"):
        AutoModel.from_pretrained(saved)


def test_other_heads_can_be_loaded_without_their_thresholds(saved, model, caplog):
    edit_weights(saved, flip_a_bit)
    loaded = AutoModel.from_pretrained(saved, ignore_certificate=True)
    assert loaded.exit_policy is None
    assert loaded.operating_points == ("exact", "bare")
    assert loaded.config.exit_certificate is loaded.config.exit_point_certificates is None
    assert len(heard(caplog, "calibrated on another model and is left out")) == 2
    assert AutoModel.from_pretrained(saved, init_missing_exits=True).exit_policy is None


def test_ignoring_a_certificate_that_fits_changes_nothing(saved, model):
    assert AutoModel.from_pretrained(saved, ignore_certificate=True).exit_policy == model.exit_policy


def test_thresholds_edited_by_hand_are_used_without_certificate_and_loudly(saved, caplog):
    policy = ee.ConfidencePolicy(thresholds=[0.1] * 3).to_dict()
    edit_config(saved, exit_policy=policy)
    loaded = AutoModel.from_pretrained(saved)
    assert loaded.config.exit_policy == policy
    assert loaded.config.exit_certificate is None
    assert heard(caplog, "not the one that was calibrated")


def test_a_policy_given_while_loading_has_no_certificate(saved):
    loaded = AutoModel.from_pretrained(saved, exit_policy=None)
    assert loaded.exit_policy is loaded.config.exit_certificate is None


def test_exits_trained_after_their_calibration_are_saved_without_thresholds(model, tmp_path, caplog):
    with torch.no_grad():
        model.exit_heads["2"].classifier.weight.add_(0.1)
    model.save_pretrained(tmp_path)
    assert heard(caplog, "The model has changed since its thresholds were chosen")
    assert AutoModel.from_pretrained(tmp_path).exit_policy is None
    assert AutoModel.from_pretrained(tmp_path).operating_points == ("exact", "bare")


def test_a_calibration_that_does_not_know_its_heads_vouches_for_nothing(results):
    from dataclasses import replace

    model = make_model()
    model.set_exit_policy(replace(results[0], fingerprint=""))
    assert model.exit_policy == results[0].policy
    assert model.config.exit_certificate is None


@pytest.mark.parametrize("value", [{}, {"fingerprint": 3, "policy": "", "dtype": ""}, {"fingerprint": "a"}])
@pytest.mark.parametrize("field", ["exit_certificate", "exit_point_certificates"])
def test_a_malformed_certificate_is_refused(saved, field, value):
    edit_config(saved, **{field: value if field == "exit_certificate" else {"fast": value}})
    with pytest.raises(EarlyExitConfigError, match="a certificate as set_exit_policy writes it"):
        AutoModel.from_pretrained(saved)


def test_weights_may_be_stored_again_unchanged(saved, model):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    assert AutoModel.from_pretrained(saved).exit_policy == model.exit_policy
    assert json.loads((saved / "config.json").read_text())["exit_certificate"] == model.config.exit_certificate


def test_another_vocabulary_is_warned_of_and_the_models_own_is_not(tmp_path, model, tokenizer, caplog):
    ee.save(model, tmp_path, tokenizer=tokenizer, card=False)
    ee.pipeline(model=str(tmp_path))
    assert not heard(caplog, "vocabulary")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    swapped = BertTokenizer(vocab={word: number for number, word in enumerate([*words[:5], *reversed(words[5:])])})
    ee.pipeline(model=str(tmp_path), tokenizer=swapped)
    assert len(heard(caplog, "the model was saved with")) == 1


def test_a_promise_stands_in_the_certificate_and_holds_in_its_dtype_only(model, tmp_path, caplog):
    trace = replace(
        learned_trace(2000, classes=model.num_labels),
        scalars={},
        fingerprint=model_fingerprint(model),
        meta={"dtype": "float32"},
    )
    result = ee.calibrate(trace, "confidence", ee.Certified(0.05, risk="harm"))
    elsewhere = replace(result, dtype="bfloat16")  # weights that bfloat16 holds, computed with in it
    model.set_exit_policy(elsewhere)
    model.set_operating_points({"fast": elsewhere})
    assert model.exit_policy == result.policy
    assert len(heard(caplog, "held in bfloat16 only")) == 2
    assert "the operating point 'fast' held" in heard(caplog, "held in bfloat16 only")[1]
    for certificate in (model.config.exit_certificate, model.config.exit_point_certificates["fast"]):
        assert certificate["promise"] is None
        assert is_certificate(certificate)
    model.set_operating_points(None)
    caplog.clear()
    model.set_exit_policy(result)
    assert model.config.exit_certificate["promise"] == json.loads(json.dumps(result.promise.to_dict()))
    assert model.config.exit_certificate["exit_shares"] == [report.share for report in result.exits]
    model.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.exit_certificate["promise"]["limit"] == 0.05
    assert not heard(caplog, "promised")
    narrow = AutoModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert len(heard(caplog, "held in float32 only")) == 1
    assert narrow.config.exit_certificate["promise"] is None
    assert narrow.exit_policy == result.policy
    assert is_certificate(narrow.config.exit_certificate)
