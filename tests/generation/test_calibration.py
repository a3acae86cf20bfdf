"""Thresholds of language models: prompts in every form, the trace is what decoding sees, texts really written choose."""

import numpy as np
import pytest
import torch
from transformers import BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.errors import CalibrationError, DataError, UsageError
from hf_earlyexit.generation.metrics import rouge_l
from hf_earlyexit.generation.prompts import left_padded, read_prompts
from hf_earlyexit.generation.token_trace import token_trace, write
from tests.generation.conftest import LAYERS, PAD, WORDS, prompts, scores_seen

NEW = 8
WRITING = {"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": PAD}
VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{number}" for number in range(5, WORDS))]
IDS = [row[: 3 + place % 4].tolist() for place, row in enumerate(prompts(10, 6)[0])]  # of several lengths


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=40)


def calibrated(model, rows=IDS, policy="confidence", target="speed-up:1.2", **options):
    usual = {**WRITING, "progress": False, "batch_size": 4, "proposals": 4}
    return ee.generation.calibrate_generation(model, rows, policy, target, **{**usual, **options})


def test_prompts_in_any_form(tokenizer):
    ids = tokenizer("w5 w9 w17")["input_ids"]
    for row in ("w5 w9 w17", ids, torch.tensor(ids), np.array(ids), {"text": "w5 w9 w17", "label": 1}, {"prompt": ids},
                {"input_ids": [*ids, 0, 0], "attention_mask": [1] * len(ids) + [0, 0]},
                {"input_ids": [*ids, 7, 8], "labels": [-100] * len(ids) + [7, 8]}):  # fmt: skip
        assert read_prompts([row, [4]], tokenizer, WORDS) == [ids, [4]]
    chat = [{"role": "user", "content": "w5"}]
    with pytest.raises(UsageError, match="Prompt 1 is a chat, and the tokenizer has no chat template"):
        read_prompts(["w5", chat], tokenizer)
    chatty = BertTokenizer(vocab=tokenizer.vocab, model_max_length=40)
    chatty.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w30"
    expected = tokenizer("w5 w30", add_special_tokens=False)["input_ids"]
    assert read_prompts([chat, {"messages": chat}], chatty) == [expected, expected]
    padded = left_padded([[4, 5, 6], [7]])
    assert padded["input_ids"][:, -1].tolist() == [6, 7]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ([], DataError, "at least one prompt"),
        ("w5 w9", DataError, "Prompts are 'w5 w9'"),
        (["w5"], UsageError, "Prompt 0 is a text; pass the model's tokenizer"),
        ([[4], []], DataError, "Prompt 1 is empty"),
        ([[4], [WORDS]], DataError, f"Prompt 1 has the id {WORDS}; expected 0 to {WORDS - 1}"),
        ([[4], [-1]], DataError, "Prompt 1 has the id -1"),
        ([[4], [0.5]], DataError, "Prompt 1 is .0.5."),
        ([[4], [[5, 6]]], DataError, "Prompt 1 is"),
        ([[4], None], DataError, "Prompt 1 is None"),
        ([{"sentence": "w5"}], DataError, "Row 0 has sentence; expected one of input_ids, messages, prompt, text"),
        ([{"input_ids": [4, 5], "labels": [-100]}], DataError, "2 ids and 1 labels"),
    ],
)
def test_what_is_no_prompt_is_refused(rows, error, words):
    with pytest.raises(error, match=words):
        read_prompts(rows, None, WORDS)


@pytest.mark.parametrize(("name", "rule"), [("gpt2", "confidence"), ("qwen3", "saturation"), ("llama", "entropy")])
def test_scores_of_the_trace_are_those_decoding_computes(writer, monkeypatch, name, rule):
    """Of prompts of several lengths, so padded on the left, where positions and windows begin later."""
    model = writer(name, exit_head="linear")
    policy = ee.policies.POLICIES.get(rule)(thresholds=(None,) * (LAYERS - 1), exit_layers=model.exit_layers)
    batch = IDS[:4]
    full = write(model, batch, None, WRITING)
    trace = token_trace(model, [(batch, full)], policy)
    seen = scores_seen(monkeypatch, policy)
    again = write(model, batch, policy, WRITING)
    assert torch.equal(again.sequences, full.sequences)
    decoded = torch.stack(seen, 1).reshape(4, NEW - 1, LAYERS - 1)
    torch.testing.assert_close(trace.scores.reshape(4, NEW - 1, LAYERS)[..., :-1], decoded, atol=1e-5, rtol=1e-4)
    assert torch.equal(trace.words[:, -1].reshape(4, -1), full.sequences[:, -NEW + 1 :]), "the full model's own words"


def test_texts_that_generate_writes_choose(writer, tokenizer, tmp_path):
    """Scores and layers of every setting are those of what `generate` writes; the choice is served, saved and loaded."""
    model = writer("gpt2", exit_head="linear")
    rows = [" ".join(VOCABULARY[one] for one in ids) for ids in IDS]
    found = calibrated(model, rows, tokenizer=tokenizer)
    batch = left_padded(read_prompts(rows, tokenizer))
    width, texts = batch["input_ids"].shape[1], []
    for setting in found.settings:
        model.set_exit_policy(found.policy.with_thresholds(setting.thresholds))
        output = model.generate(**batch, **WRITING, return_exit_layers=True)
        texts.append(tokenizer.batch_decode(output.sequences[:, width:].tolist(), skip_special_tokens=True))
        assert setting.mean_layers == pytest.approx(float(output.exit_layers[:, width:].double().mean()))
        scores = rouge_l(texts[-1], [[text] for text in texts[0]])
        assert setting.score == pytest.approx(np.mean(scores))
        assert setting.standard_error == pytest.approx(np.std(scores) / len(scores) ** 0.5)
    assert found.layer_speed_up > 1.2 > 1 == found.settings[0].score > found.quality
    model.set_exit_policy(found)
    found.save(tmp_path / "calibration.json")
    assert ee.calibration.CalibrationResult.load(tmp_path / "calibration.json") == found
    model.save_pretrained(tmp_path)
    again = ee.from_pretrained(tmp_path)
    assert again.exit_policy == found.policy
    assert again.config.exit_certificate["num_rows"] == len(rows)
    known = calibrated(model, rows, tokenizer=tokenizer, references=[["w5 w6", "w9"]] * len(rows))
    assert known.full_quality == pytest.approx(np.mean(rouge_l(texts[0], [["w5 w6", "w9"]] * len(rows))))


def test_learned_weights_come_from_other_prompts(writer):
    found = calibrated(writer("llama", exit_head="linear"), policy="beem-a", learning_share=0.3)
    assert (found.num_learning_rows, found.num_rows) == (3, 7)
    assert found.policy.weights[-1] == 1.0 > min(found.policy.weights)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lossless": True}, UsageError, "calibrate_drafts is for them"),
        ({"input_ids": torch.ones(1, 1)}, UsageError, "prompts come as rows"),
        ({"operating_point": "fast"}, UsageError, "operating_point cannot be given here"),
        ({"image_processor": 1}, UsageError, "reads no pictures"),
        ({"batch_size": 0}, UsageError, "batch_size is 0"),
        ({"proposals": True}, CalibrationError, "proposals is True"),
        ({"do_sample": True}, UsageError, "do_sample is True"),
        ({"max_new_tokens": 1}, CalibrationError, "No text has a token"),
        ({"references": ["w5"] * 10}, DataError, "pass the tokenizer"),
        ({"policy": "gate"}, CalibrationError, "gate policy cannot decide"),
        ({"use_cache": False}, UsageError, "use_cache"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wishes_that_cannot_be_met(writer, options, error, words):
    with pytest.raises(error, match=words):
        calibrated(writer("llama"), **options)


def test_classifiers_and_captioners_are_told_where_to_go():
    from tests.hub.toy import make_model

    with pytest.raises(UsageError, match="does not write; expected a captioner or language model"):
        calibrated(make_model())
    with pytest.raises(UsageError, match="does not write; expected a captioner or language model"):
        ee.generation.calibrate_drafts(make_model(), IDS)
