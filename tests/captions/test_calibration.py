"""Thresholds of captioners: the trace is what decoding sees, real captions choose, bad wishes are refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.modeling_outputs import BaseModelOutput

import hf_earlyexit as ee
from hf_earlyexit.calibration import CalibrationResult
from hf_earlyexit.calibration.proposals import propose
from hf_earlyexit.errors import (
    CalibrationError,
    CheckpointError,
    DataError,
    EarlyExitConfigError,
    PermitsEverything,
    UnknownNameError,
    UsageError,
)
from hf_earlyexit.generation import token_trace as tracing
from hf_earlyexit.generation.metrics import rouge_l
from tests.captions.conftest import LAYERS, WORDS
from tests.generation.conftest import scores_seen

NEW = 6
RULES = ["confidence", "entropy", "margin", "patience", "beem-c", "beem-a", "gate", "saturation", "static"]


def calibrated(model, rows, policy="confidence", target="speed-up:1.2", **options):
    usual = {"max_new_tokens": NEW, "progress": False, "batch_size": 8, "proposals": 4}
    return ee.generation.calibrate_generation(model, rows, policy, target, **{**usual, **options})


def full_captions(model, images, **options):
    states = model.read_prompts(images, None, None, 4)
    batches = [states[start : start + 4] for start in range(0, len(states), 4)]
    return [(part, tracing.write(model, part, None, {"max_new_tokens": NEW, **options})) for part in batches]


# --- the trace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_scores_of_the_trace_are_those_decoding_computes(captioner, images, mixed, monkeypatch, kind, rule):
    """Where nobody leaves, decoding asks every token over the cache that the trace assumes."""
    model = captioner(kind, exit_head="linear", exit_gate="linear")
    policy = mixed(model, rule).with_thresholds(None)
    batches = full_captions(model, images(4), eos_token_id=None)
    trace = tracing.token_trace(model, batches, policy)
    scores = trace.scores.reshape(4, NEW - 1, LAYERS)
    seen = scores_seen(monkeypatch, policy)
    tracing.write(model, batches[0][0], policy, {"max_new_tokens": NEW, "eos_token_id": None})
    decoded = torch.stack(seen, 1).reshape(4, NEW - 1, LAYERS - 1)
    torch.testing.assert_close(scores[:, :, :-1], decoded, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", ["confidence", "saturation"])
def test_the_first_early_token_leaves_where_the_trace_says(captioner, images, mixed, rule):
    model, batch = captioner(), images(8)
    policy = mixed(model, rule)
    (states, full), *_ = full_captions(model, batch[:4])
    scores = tracing.token_trace(model, [(states, full)], policy).scores
    starts = [0, *(full.exit_layers > 0).sum(1).sub(1).cumsum(0).tolist()][:-1]
    taken = policy.decide(scores[starts])
    written = tracing.write(model, states, policy, {"max_new_tokens": NEW})
    assert written.exit_layers[:, 2].tolist() == (taken + 1).tolist()
    assert len(set(taken.tolist())) > 1


def test_words_of_the_trace_are_the_captions_own(captioner, images):
    """The last column is what greedy search wrote; the others are what every exit says there."""
    model = captioner(exit_layers=[2, 3, 4])
    (states, full), *_ = full_captions(model, images(4))
    trace = tracing.token_trace(model, [(states, full)])
    own = [row[(left > 0)][1:] for row, left in zip(full.sequences, full.exit_layers, strict=True)]
    assert torch.equal(trace.words[:, -1], torch.cat(own))
    with torch.no_grad():
        said = model(
            encoder_outputs=BaseModelOutput(torch.stack(states)), decoder_input_ids=full.sequences[:1, :-1], early_exit=False
        ).exit_logits[0]
    length = len(own[0])
    assert torch.equal(trace.words[:length], said[1 : 1 + length].argmax(-1))
    assert trace.agrees[:, -1].all()
    assert 0 < trace.agrees[:, :-1].mean() < 1


def test_a_trace_keeps_no_logits(captioner, images, mixed):
    model = captioner()
    trace = tracing.token_trace(model, full_captions(model, images(6)), mixed(model, "confidence"))
    assert trace.words.shape == trace.scores.shape == (len(trace.words), LAYERS)
    assert sum(part.numel() for part in trace) < len(trace.words) * WORDS


def test_muted_exits_have_no_score(captioner, images, mixed):
    model = captioner()
    policy = ee.BeemPolicy(thresholds=(None, 1.0, 1.0), weights=(1.0,) * 4, muted=(0,))
    scores = tracing.token_trace(model, full_captions(model, images(4)), policy).scores
    assert torch.isneginf(scores[:, 0]).all()
    assert torch.isfinite(scores[:, 1:]).all()


# --- proposals --------------------------------------------------------------------------------------------------------


def test_proposals_are_spread_differ_and_bound_the_disagreement():
    draw = np.random.default_rng(0)
    scores = draw.random((2000, 4))
    agrees = (draw.random((2000, 4)) < 0.5 + 0.5 * scores).astype(float)
    agrees[:, -1] = 1
    layers = np.array([1.0, 2.0, 3.0, 4.0])
    found = propose(scores, agrees, layers, 12, 0.0, False)
    shared = [one for one in found if one.kind == "one threshold"]
    assert len({one.thresholds for one in found}) == len(found) <= 12
    assert np.diff([one.trace_layers for one in shared]) == pytest.approx([-3 / 7] * 5, abs=0.02)
    for one in found:
        left = np.array([next((e for e in range(3) if t[e] is not None and row[e] >= t[e]), 3)
                         for row, t in ((row, one.thresholds) for row in scores)])  # fmt: skip
        assert layers[left].mean() == pytest.approx(one.trace_layers)
        if one.kind == "per exit":
            for exit_ in set(left.tolist()) - {3}:
                assert 1 - agrees[left == exit_, exit_].mean() < 0.3
    assert len([one for one in found if one.kind == "per exit"]) > 2


# --- the whole ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_calibrates_and_is_served_as_it_was_scored(captioner, images, rule):
    model, batch = captioner(exit_head="linear", exit_gate="linear"), images(10)
    found = calibrated(model, batch, rule, "max-drop:0.9")
    assert found.policy.name == rule
    assert found.layer_speed_up > 1
    assert model.exit_policy is None, "calibrating changes no model"
    model.set_exit_policy(found)
    assert model.config.exit_certificate["num_rows"] == found.num_rows
    if rule == "beem-a":
        assert found.num_learning_rows == 2
        return
    served = model.generate(batch, max_new_tokens=NEW, return_exit_layers=True).exit_layers
    assert served[served > 0].double().mean() == pytest.approx(found.mean_layers)
    shares = [float((served[served > 0] == layer).double().mean()) for layer in range(1, LAYERS + 1)]
    assert [report.share for report in found.exits] == pytest.approx(shares)


def test_scores_are_those_of_captions_really_written(captioner, images):
    """The table holds, for each setting, the mean over images and the paired standard error of what generate writes."""
    model, batch = captioner(), images(12)

    def share_of_full(captions, references):
        return [float(np.mean([word in own[0].split() for word in said.split()])) for said, own in
                zip(captions, references, strict=True)]  # fmt: skip

    found = calibrated(model, batch, metric=share_of_full)
    texts = []
    for setting in found.settings:  # what generate writes of all images at once
        policy = found.policy.with_thresholds(setting.thresholds)
        model.set_exit_policy(policy)
        output = model.generate(batch, max_new_tokens=NEW, return_exit_layers=True)
        texts.append([" ".join(map(str, ids[left > 0].tolist()))
                      for ids, left in zip(output.sequences, output.exit_layers, strict=True)])  # fmt: skip
        left = output.exit_layers[output.exit_layers > 0].double()
        assert setting.mean_layers == pytest.approx(float(left.mean()))
    references = [[text] for text in texts[0]]
    base = np.array(share_of_full(texts[0], references))
    for setting, written in zip(found.settings, texts, strict=True):
        scores = np.array(share_of_full(written, references))
        assert setting.score == pytest.approx(scores.mean())
        assert setting.difference == pytest.approx((scores - base).mean())
        assert setting.standard_error == pytest.approx((scores - base).std() / 12**0.5)
    assert found.settings[0].kind == "full model"
    assert found.settings[0].mean_layers == LAYERS
    assert found.quality == found.settings[found.chosen].score


@pytest.mark.parametrize("target", [ee.MaxDrop(0.25), ee.MaxDrop(0.3, sigmas=1.0), ee.LayerBudget(3.0), ee.SpeedUp(1.4)])
def test_targets_pick_among_the_settings(captioner, images, target):
    found = calibrated(captioner(), images(10), target=target)
    spare = getattr(target, "sigmas", 0)
    if isinstance(target, ee.MaxDrop):
        fit = [one for one in found.settings if one.difference - spare * one.standard_error >= -target.drop]
        assert found.mean_layers == min(one.mean_layers for one in fit) < LAYERS
    else:
        most = target.layers if isinstance(target, ee.LayerBudget) else LAYERS / target.ratio
        fit = [one for one in found.settings if one.mean_layers <= most]
        assert found.quality == max(one.score for one in fit)
    assert found.settings[found.chosen] in fit
    assert len(fit) < len(found.settings)
    assert found.policy.thresholds == found.settings[found.chosen].thresholds


def test_a_target_out_of_reach_says_what_there_is(captioner, images):
    with pytest.raises(CalibrationError, match="No threshold reaches a layer speed-up of 9"):
        calibrated(captioner(), images(6), target="speed-up:9")


def test_a_setting_that_loses_too_much_leaves_the_full_model(captioner, images):
    worse = iter(range(100))

    def falling(captions, references):
        return [-float(next(worse))] * len(captions)

    found = calibrated(captioner(), images(6), target="max-drop:0.5", metric=falling)
    assert found.chosen == 0
    assert found.policy.thresholds == (None,) * 3
    assert "no token leaves early" in found.notes[0]


def test_falling_thresholds_are_confirmed_as_they_are_served(captioner, images):
    model, batch = captioner(exit_decay=0.3), images(12)
    found = calibrated(model, batch)
    assert found.exit_decay == 0.3
    assert "exit_decay=0.3" in found.notes[0]
    model.set_exit_policy(found)
    served = model.generate(batch, max_new_tokens=NEW, return_exit_layers=True).exit_layers
    assert served[served > 0].double().mean() == pytest.approx(found.mean_layers)
    steady = captioner()
    steady.set_exit_policy(found.policy)
    other = steady.generate(batch, max_new_tokens=NEW, return_exit_layers=True).exit_layers
    assert other[other > 0].double().mean() != pytest.approx(found.mean_layers)


class Words:
    """Decodes ids to words "w5"."""

    def batch_decode(self, rows, skip_special_tokens):
        assert skip_special_tokens
        return [" ".join(f"w{number}" for number in row if number > 2) for row in rows]


def test_references_and_beams(captioner, images):
    model, batch = captioner(), images(10)
    known = [["w5 w6"], *["w7"] * 9]
    found = calibrated(model, batch, tokenizer=Words(), references=known, num_beams=2)
    assert "references" in found.metric
    assert found.full_quality < 1
    full = Words().batch_decode(model.generate(batch, max_new_tokens=NEW, num_beams=2, early_exit=False).tolist(), True)
    expected = rouge_l(full, [["w5 w6"], *[["w7"]] * 9])
    assert found.full_quality == pytest.approx(np.mean(expected))
    assert found.generation == {"max_new_tokens": NEW, "num_beams": 2}


def test_weights_of_beem_a_are_agreement_on_other_images(captioner, images):
    model, batch = captioner(exit_head="linear"), images(20)
    found = calibrated(model, batch, "beem-a", learning_share=0.3, seed=3)
    assert (found.num_learning_rows, found.num_rows) == (6, 14)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:6].sort().values
    states = model.read_prompts(batch[order], None, None, 8)
    trace = tracing.token_trace(model, [(states, tracing.write(model, states, None, {"max_new_tokens": NEW}))])
    expected = (trace.words == trace.words[:, -1:]).float().mean(0).tolist()
    assert found.policy.weights == pytest.approx(expected)
    assert found.policy.weights[-1] == 1.0


def test_images_pixels_and_features_give_the_same(captioner):
    model = captioner()
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(6)]
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model.encoder(pixels).last_hidden_state
    ways = [
        (pictures, {"image_processor": processor}),
        ([{"image": picture} for picture in pictures], {"image_processor": processor}),
        (pixels, {}),
        ([{"pixel_values": row} for row in pixels], {}),
        ([{"encoder_hidden_states": row} for row in states], {}),
    ]
    found = [calibrated(model, rows, **extra) for rows, extra in ways]
    assert all(one.settings[-1].thresholds == pytest.approx(found[0].settings[-1].thresholds) for one in found)
    assert all(one.mean_layers == pytest.approx(found[0].mean_layers) for one in found)


def test_a_result_through_a_file_and_into_a_certificate(captioner, images, tmp_path):
    model = captioner(exit_head="linear")
    found = calibrated(model, images(12), num_beams=1)
    found.save(tmp_path / "calibration.json")
    assert CalibrationResult.load(tmp_path / "calibration.json") == found
    assert json.loads((tmp_path / "calibration.json").read_text())["format"] == "hf_earlyexit.generation-calibration/1"
    assert ee.calibration.GenerationCalibrationResult.from_dict(found.to_dict()) == found
    table = str(found).splitlines()
    assert len([line for line in table if "one threshold" in line or "per exit" in line or "full model   " in line]) == len(
        found.settings
    )
    assert len([line for line in table if line.startswith(">")]) == 1
    model.set_operating_points({"quick": found})
    model.save_pretrained(tmp_path / "model")
    assert ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path / "model").policy_at("quick") == found.policy
    with pytest.raises(CheckpointError, match=r"chosen on (a|another) model"):
        captioner(seed=1, exit_head="linear").set_exit_policy(found)


# --- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"split": "train"}, CalibrationError, "tagged 'train'"),
        ({"target": ee.FinalLayerError()}, CalibrationError, "MaxDrop, SpeedUp, LayerBudget or Certified"),
        ({"target": 3}, CalibrationError, "target is 3"),
        ({"policy": "nonsense"}, UnknownNameError, "nonsense"),
        ({"policy": "gate"}, CalibrationError, "learn_gates=True"),
        ({"policy": "beem-calibrated"}, CalibrationError, "logits of many rows"),
        ({"policy": "reward"}, CalibrationError, "logits of many rows"),
        ({"policy": "beem-a", "learning_share": 0.01}, CalibrationError, "rows on both sides"),
        ({"policy": ee.ConfidencePolicy(thresholds=(0.5,) * 2)}, EarlyExitConfigError, "3 thresholds"),
        (
            {"policy": ee.ConfidencePolicy(thresholds=(0.5,) * 3), "options": {"muted": (0,)}},
            UsageError,
            "options go with",
        ),
        ({"proposals": 1}, CalibrationError, "proposals is 1"),
        ({"do_sample": True}, UsageError, "do_sample is True"),
        ({"num_beams": 2, "num_return_sequences": 2}, UsageError, "num_return_sequences is 2"),
        ({"use_cache": False}, UsageError, "use_cache"),
        ({"decoder_input_ids": torch.ones(1, 1)}, UsageError, "decoder_input_ids cannot be given"),
        ({"rows": torch.zeros(0, 3, 16, 16)}, DataError, "no images"),
        ({"rows": [Image.new("RGB", (16, 16))]}, UsageError, "image_processor"),
        ({"rows": [{"photo": 1}]}, DataError, "expected pixel_values"),
        ({"references": ["a"] * 4}, DataError, "pass the tokenizer"),
        ({"references": ["a"] * 3, "tokenizer": Words()}, DataError, "3 entries for 4 rows"),
        ({"references": ["a", "b", "c", []], "tokenizer": Words()}, DataError, r"references\[3\] is empty"),
        ({"metric": lambda captions, references: [1.0]}, DataError, "one finite number"),
        ({"metric": lambda captions, references: [float("nan")] * len(captions)}, DataError, "gave nan for text 0, "),
        ({"max_new_tokens": 1}, CalibrationError, "No text has a token that may leave early"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wishes_that_cannot_be_met(captioner, images, options, error, words):
    rows = options.get("rows", images(4))
    with pytest.raises(error, match=words):
        calibrated(captioner(), rows, **{name: value for name, value in options.items() if name != "rows"})


def test_a_model_without_early_exits_is_refused(captioner, images):
    with pytest.raises(CalibrationError, match="no early exit"):
        calibrated(captioner(exit_layers=[4]), images(4))


def test_a_trace_on_other_states_is_noticed(captioner, images, mixed, monkeypatch):
    """The mutant: every exit is asked with the state that came into its layer."""
    model = captioner(exit_head="linear")
    policy, batches = mixed(model, "confidence"), full_captions(model, images(4))
    right = tracing.token_trace(model, batches, policy).scores
    signal = tracing.DecoderWalker.exit_signal

    def late(self, index, hidden, context, asks=(), before=None):
        return signal(self, index, before, context, asks, before)

    monkeypatch.setattr(tracing.DecoderWalker, "exit_signal", late)
    assert not torch.allclose(tracing.token_trace(model, batches, policy).scores, right, atol=1e-2)


def test_a_drop_meant_in_points_is_warned_of_at_the_callers_line(captioner, images):
    with pytest.warns(PermitsEverything, match="permits to lose all") as caught:
        made = calibrated(captioner(), images(6), target="max-drop:1")
    assert [warning.filename for warning in caught] == [__file__]
    assert any("permits to lose all" in note for note in made.notes)
