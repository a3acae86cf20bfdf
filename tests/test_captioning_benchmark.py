"""The captioning benchmark's own parts: scores, vocabulary, encoder, and captions packed into one row."""

import importlib
import io
import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
CAPTIONS = [["A dog runs .", "A black dog runs on grass"], ["A boy jumps", "A boy in red jumps over a dog , a rope"]]


@pytest.fixture
def part(monkeypatch):
    """`part("data")`: a module of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"captioning_{name}")


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=28, patch_size=7
    )
    model = ViTModel(config, add_pooling_layer=False)
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.fixture
def parts(part, vit, tmp_path):
    """A folder with a tiny encoder and a vocabulary, as `prepare` leaves it."""
    data = part("data")
    data.make_encoder(vit, layers=2, size=14).save_pretrained(tmp_path / "parts/encoder")
    ViTImageProcessorPil(size={"height": 14, "width": 14}).save_pretrained(tmp_path / "parts/encoder")
    tokenizer = data.make_tokenizer((caption for both in CAPTIONS for caption in both), least_count=2)
    tokenizer.save_pretrained(tmp_path / "parts/tokenizer")
    return tmp_path


def test_bleu_and_rouge_of_a_caption_worked_out_by_hand(part):
    scores = part("metrics").score(["A dog runs on grass."], [["a dog runs in the grass", "Dog on grass!"]])
    # all five words are known; the closest reference has six
    assert scores["BLEU-1"] == pytest.approx(math.exp(1 - 6 / 5), abs=1e-6)
    # "a dog runs .. grass" is 4 of 5 words said, "dog on grass" 3 of 3 words known
    precision, recall, beta = 4 / 5, 1.0, 1.2
    assert scores["ROUGE-L"] == pytest.approx((1 + beta**2) * precision * recall / (recall + beta**2 * precision))


def test_cider_leaves_out_what_every_photo_has_and_averages_over_photos(part):
    metrics = part("metrics")
    said, known = ["a red dog", "a blue cat"], [["A red dog."], ["a green fish"]]
    # photo 1: 1-, 2- and 3-grams agree wholly and there is no 4-gram; photo 2 shares only "a", which tells nothing
    assert metrics.per_photo(said, known)["CIDEr"] == pytest.approx([7.5, 0.0])
    assert metrics.score(said, known)["CIDEr"] == pytest.approx(3.75)


def test_scores_refuse_captions_without_references(part):
    with pytest.raises(ValueError, match="1 captions for 2"):
        part("metrics").score(["a"], [["a"], ["b"]])


def test_vocabulary_holds_frequent_words_and_gives_them_back(part):
    tokenizer = part("data").make_tokenizer(["A dog .", "a DOG, runs!", "a boy's dog"], least_count=2)
    assert sorted(tokenizer.get_vocab()) == ["<bos>", "<eos>", "<pad>", "<unk>", "a", "dog"]
    ids = tokenizer("A dog runs.")["input_ids"]
    assert (ids[0], ids[-1], ids[-2]) == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert tokenizer.decode(tokenizer("A dog.")["input_ids"], skip_special_tokens=True) == "a dog"


def test_smaller_encoder_is_the_first_layers_with_the_positions_resized(part, vit):
    whole, small = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval(), part("data").make_encoder(vit, 2, 14)
    pixels = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        hidden = whole(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(small(pixels).last_hidden_state, whole.layernorm(hidden))
    assert small.config.image_size == 14
    assert len(small.layers) == small.config.num_hidden_layers == 2


def test_features_follow_the_order_of_the_photos(part, parts, monkeypatch):
    data = part("data")
    encoder, processor = data.load_encoder(parts)
    photos = [Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20, 3), np.uint8)) for seed in range(3)]
    files = [io.BytesIO() for _ in photos]
    for photo, file in zip(photos, files, strict=True):
        photo.save(file, "PNG")
    rows = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue()} for file in files]})
    monkeypatch.setattr(data, "load_split", lambda split: rows)
    made = data.features(encoder, processor, "dev", batch_size=2)
    with torch.no_grad():
        alone = [encoder(**processor(photo, return_tensors="pt")).last_hidden_state[0] for photo in photos]
    assert made.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(made).float(), torch.stack(alone), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_captions_packed_into_one_row_do_not_see_each_other(part, parts, attention):
    train, tokenizer = part("train"), part("data").load_tokenizer(parts)
    torch.manual_seed(0)
    model = train.make_model(parts, train.Recipe(layers=2, width=16, heads=2), tokenizer).eval()
    model.decoder.set_attn_implementation(attention)
    hidden = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float16)
    rows = train.pack(CAPTIONS, tokenizer).add_column("split", ["dev"] * 2)
    batch = train.PackedBatch({"dev": hidden}, tokenizer.pad_token_id)(list(rows))
    with torch.no_grad():
        packed, one_sequence = model(**batch).logits, model(**batch | {"decoder_position_ids": None}).logits
        for photo, captions in enumerate(CAPTIONS):
            start = 0
            for ids in tokenizer(captions)["input_ids"]:
                end = start + len(ids) - 1
                alone = model(
                    encoder_outputs=(torch.tensor(hidden[photo : photo + 1]).float(),),
                    decoder_input_ids=torch.tensor([ids[:-1]]),
                ).logits[0]
                torch.testing.assert_close(packed[photo, start:end], alone)
                if start:  # what positions that start again prevent
                    assert not torch.allclose(one_sequence[photo, start:end], alone)
                targets = [-100 if word == tokenizer.unk_token_id else word for word in ids[1:]]
                assert batch["labels"][photo, start:end].tolist() == targets
                start = end
            assert (batch["labels"][photo, start:] == -100).all()


def test_captioner_saves_as_an_ordinary_model_that_generates(part, parts, tmp_path):
    train, tokenizer = part("train"), part("data").load_tokenizer(parts)
    model = train.make_model(parts, train.Recipe(layers=2, width=16, heads=2), tokenizer).eval()
    assert not any(weight.requires_grad for weight in model.encoder.parameters())
    model.save_pretrained(tmp_path / "captioner")
    loaded, report = VisionEncoderDecoderModel.from_pretrained(tmp_path / "captioner", output_loading_info=True)
    assert not any(report.values())
    hidden = np.random.default_rng(0).standard_normal((3, 5, 32)).astype(np.float16)
    said = [part("eval").generate_captions(each.eval(), tokenizer, hidden, batch_size=2) for each in (model, loaded)]
    assert said[0] == said[1]
    assert len(said[0]) == 3


def test_the_epoch_with_the_best_captions_on_dev_is_kept(part, parts, monkeypatch):
    train, evaluation, tokenizer = part("train"), part("eval"), part("data").load_tokenizer(parts)
    runs, biases = parts / "checkpoints/tiny-0", {5: 0.5, 10: 1.0, 100: 2.0}
    for step, bias in biases.items():
        model = train.make_model(parts, train.Recipe(layers=1, width=16, heads=2), tokenizer)
        torch.nn.init.constant_(model.decoder.transformer.ln_f.bias, bias)
        model.save_pretrained(runs / f"checkpoint-{step}")
    (runs / "train.json").write_text('{"log": [{"eval_loss": 3.0}, {"loss": 9.0}, {"eval_loss": 2.9}, {"eval_loss": 2.8}]}')
    np.save(parts / "parts/dev.npy", np.zeros((2, 5, 32), np.float16))
    figures = iter([{"CIDEr": 0.4}, {"CIDEr": 0.6}, {"CIDEr": 0.5}])
    monkeypatch.setattr(evaluation, "load_captions", lambda split: CAPTIONS)
    monkeypatch.setattr(evaluation, "score", lambda captions, references: next(figures))
    evaluation.pick("tiny", 0, parts)
    record = json.loads((parts / "tiny-0/train.json").read_text())
    assert record["epoch_chosen"] == 2
    assert record["dev"][1] == {"loss": 2.9, "CIDEr": 0.6}
    kept = VisionEncoderDecoderModel.from_pretrained(parts / "tiny-0")
    assert kept.decoder.transformer.ln_f.bias[0] == biases[10]
    assert AutoTokenizer.from_pretrained(parts / "tiny-0").get_vocab() == tokenizer.get_vocab()
    assert AutoImageProcessor.from_pretrained(parts / "tiny-0", backend="pil").size == {"height": 14, "width": 14}
