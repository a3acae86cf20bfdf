"""Pictures in, captions with their layers out: our pipeline, the stock ones, and the words of a caption."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoProcessor,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    pipeline,
)

import hf_earlyexit as ee
from hf_earlyexit.captions.answers import caption_entry
from hf_earlyexit.errors import CheckpointError, DataError, UnknownNameError, UsageError
from hf_earlyexit.modeling import certificate
from tests.captions.conftest import ENCODER, LAYERS, START
from tests.captions.toy import essence, make_captioner, make_image_processor, make_pictures, make_tokenizer, save_all

TASK = "early-exit-captioning"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner")
    save_all(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(folder):
    return ee.pipeline(TASK, model=folder)


@pytest.fixture(scope="module")
def pictures():
    return make_pictures()


def by_generate(model, picture, **options):
    """A picture's token ids and exit layers, by the model itself."""
    pixels = make_image_processor()(images=picture, return_tensors="pt")["pixel_values"]
    output = model.generate(pixels, return_exit_layers=True, **options)
    layers = output.exit_layers[0]
    return output.sequences[0][layers > 0].tolist(), layers[layers > 0].tolist()


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"operating_point": "fast"}, {"early_exit": False}, {"max_new_tokens": 4}], ids=str
)
def test_answers_are_those_of_generate_for_any_batch_size(pipe, pictures, options):
    tokenizer = make_tokenizer()
    answers = pipe(pictures, **options)
    for picture, answer in zip(pictures, answers, strict=True):
        ids, layers = by_generate(pipe.model, picture, **options)
        assert answer["exit_layers"] == layers
        assert answer["tokens"] == tokenizer.convert_ids_to_tokens(ids)
        assert answer["generated_text"] == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert answer["mean_exit_layer"] == pytest.approx(sum(layers) / len(layers))
    for batch_size in (2, 6):
        assert essence(pipe(pictures, batch_size=batch_size, **options)) == essence(answers)


def test_layers_differ_and_points_differ(pipe, pictures):
    def mean(**options):
        return sum(one["mean_exit_layer"] for one in pipe(pictures, **options)) / len(pictures)

    assert len({layer for one in pipe(pictures) for layer in one["exit_layers"]}) >= 3
    assert mean(operating_point="fast") < mean() < mean(operating_point="exact") == LAYERS


def test_captions_without_loss_are_the_full_models(pipe, pictures):
    full, drafted = pipe(pictures, operating_point="exact"), pipe(pictures, operating_point="fast", lossless=True)
    assert [one["tokens"] for one in drafted] == [one["tokens"] for one in full]
    assert essence(pipe(pictures, lossless=False)) == essence(pipe(pictures))
    with pytest.raises(UsageError, match="no policy makes drafts"):
        pipe(pictures[0], lossless=True, operating_point="exact")


def test_options_may_be_given_when_it_is_made(folder, pipe, pictures):
    made = ee.pipeline(TASK, model=folder, operating_point="fast", num_beams=2, generate_kwargs={"length_penalty": 0.5})
    called = pipe(pictures, operating_point="fast", generate_kwargs={"num_beams": 2, "length_penalty": 0.5})
    assert essence(made(pictures)) == essence(called)


def test_several_captions_of_one_picture(pipe, pictures):
    three = {"num_beams": 3, "generate_kwargs": {"num_return_sequences": 3}}
    answers = pipe(pictures[:2], batch_size=2, **three)
    assert [len(answer) for answer in answers] == [3, 3]
    assert essence([answers[0][0]]) == essence(pipe(pictures[:1], num_beams=3))


def test_pictures_may_be_files_and_of_any_mode(pipe, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    assert essence([pipe(str(tmp_path / "a.png"))]) == essence(pipe((tmp_path / "a.png", pictures[1])))[:1]
    turned = pictures[0].transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera says: turn by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    assert essence([pipe(tmp_path / "turned.png")]) == essence([pipe(pictures[0])])
    assert pipe(Image.new("L", (9, 9)))["generated_text"] == pipe(Image.new("RGB", (9, 9)))["generated_text"]
    assert essence(pipe(one for one in pictures[:2])) == essence(pipe(pictures[:2]))


@pytest.mark.parametrize("kind", ["frame", "columns", "data set", "arrays", "pixels", "dicts", "files"])
def test_tables_are_rows(pipe, pictures, tmp_path, kind):
    chosen = pictures[:3]
    for place, picture in enumerate(chosen):
        picture.save(tmp_path / f"{place}.png")
    names = [str(tmp_path / f"{place}.png") for place in range(3)]
    given = {
        "frame": lambda: pandas.DataFrame({"image": chosen, "id": [1, 2, 3]}, index=[7, 3, 5]),
        "columns": lambda: {"id": [1, 2, 3], "img": chosen},
        "data set": lambda: Dataset.from_dict({"image": chosen}),
        "arrays": lambda: [np.asarray(picture) for picture in chosen],
        "pixels": lambda: {"pixel_values": make_image_processor()(chosen, return_tensors="pt")["pixel_values"]},
        "dicts": lambda: [{"picture": picture} for picture in chosen],
        "files": lambda: {"file_name": names},
    }[kind]()
    assert essence(pipe(given)) == essence(pipe(chosen))


def test_a_table_without_pictures_is_refused(pipe):
    with pytest.raises(DataError, match="No pictures among text, label"):
        pipe({"text": ["a"], "label": [0]})
    with pytest.raises(DataError, match="No pictures to caption"):
        pipe({"image": []})


@pytest.mark.parametrize("options", [{}, {"early_exit": False}, {"num_beams": 2}, {"generate_kwargs": {"do_sample": True}}])
@pytest.mark.parametrize("where", ["the vocabulary", "the encoder", "one picture"])
def test_answers_that_are_not_finite_are_an_error_of_their_picture(pictures, options, where):
    model = make_captioner()
    pipe = ee.pipeline(TASK, model=model, tokenizer=make_tokenizer(), image_processor=make_image_processor())
    pixels = make_image_processor()(pictures[:2], return_tensors="pt")["pixel_values"]
    if where == "one picture":
        pixels[1] = torch.inf
        number = 1
    else:
        part = model.encoder if where == "the encoder" else model.decoder.lm_head
        with torch.no_grad():
            next(part.parameters()).view(-1)[3] = torch.nan
        number = 0
    expected = rf"Row {number} has an answer that is not finite: the model's weights hold such values"
    with pytest.raises(DataError, match=expected):
        pipe({"pixel_values": pixels}, batch_size=2, **options)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "the list is empty"),
        ("nowhere.png", "There is no picture nowhere.png"),
        ("https://example.com/dog.png", "download the picture"),
        (7, "given as int"),
        ([None], "given as NoneType"),
        ("{text}", "is no picture that Pillow can read"),
        ("{cut}", "is no picture that Pillow can read"),
    ],
)
def test_what_is_no_picture_is_refused(pipe, pictures, tmp_path, given, words):
    (tmp_path / "text.png").write_text("hello")
    pictures[0].save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    if isinstance(given, str):
        given = given.format(text=tmp_path / "text.png", cut=tmp_path / "cut.png")
    with pytest.raises(DataError, match=words):
        pipe(given)


def test_models_and_options_that_do_not_fit(folder, pipe, pictures, tiny_model, tokenizer):
    parts = {"tokenizer": make_tokenizer(), "image_processor": make_image_processor()}
    with pytest.raises(UsageError, match=r"another task: ee.pipeline\('early-exit-captioning'"):
        ee.pipeline("text-classification", model=make_captioner(), tokenizer=make_tokenizer())
    with pytest.raises(UsageError, match=r"another task: ee.pipeline\('text-classification'"):
        ee.pipeline(TASK, model=tiny_model(), **parts)
    with pytest.raises(UnknownNameError, match="Did you mean 'early-exit-captioning'"):
        ee.pipeline("captioning", model=folder)
    plain = VisionEncoderDecoderModel(
        VisionEncoderDecoderConfig(
            encoder=ViTConfig(**ENCODER).to_dict(), decoder=GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9).to_dict()
        )
    )
    with pytest.raises(UsageError, match="has no exits"):
        ee.pipeline(TASK, model=plain, **parts)
    with pytest.raises(UsageError, match="has no exits"):
        pipeline(TASK, model=plain, **parts)
    with pytest.raises(UnknownNameError, match="Did you mean 'fast'"):
        pipe(pictures[0], operating_point="fasst")
    with pytest.raises(UsageError, match="given twice"):
        pipe(pictures[0], num_beams=2, generate_kwargs={"num_beams": 3})
    with pytest.raises(UsageError, match="contradicts"):
        pipe(pictures[0], operating_point="fast", early_exit=False)


def test_a_folder_without_image_processor_or_tokenizer_says_so(tmp_path):
    model = make_captioner()
    ee.save(model, tmp_path, tokenizer=make_tokenizer(), card=False)
    with pytest.raises(CheckpointError, match="holds no image processor"):
        ee.pipeline(TASK, model=str(tmp_path))
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        ee.pipeline(TASK, model=tmp_path / "bare")


def test_a_tokenizer_without_padding_makes_batches_and_stays_as_it_is(pictures):
    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"
    pipe = ee.pipeline(TASK, model=make_captioner(), tokenizer=tokenizer, image_processor=make_image_processor())
    assert essence(pipe(pictures, batch_size=6)) == essence(pipe(pictures))
    assert tokenizer.pad_token is None


def test_another_tokenizer_is_warned_of(folder, tokenizer, monkeypatch):
    said = []
    monkeypatch.setattr(certificate.logger, "warning", said.append)
    ee.pipeline(TASK, model=folder, tokenizer=tokenizer)
    assert "vocabulary" in said[0]


# --- the stock pipelines ------------------------------------------------------------------------------------------


def test_transformers_knows_the_task(folder, pipe, pictures):
    stock = pipeline(TASK, model=folder)
    assert essence(stock(pictures, batch_size=3)) == essence(pipe(pictures))


def test_image_text_to_text_takes_the_folder(folder, pipe, pictures):
    stock = pipeline("image-text-to-text", model=folder)
    expected = [answer["generated_text"] for answer in pipe(pictures)]
    alone = [stock(picture, text="", return_full_text=False)[0]["generated_text"].strip() for picture in pictures]
    together = stock(pictures, text=[""] * len(pictures), return_full_text=False)
    assert alone == [one["generated_text"].strip() for one in together] == expected
    ran = []
    stock.model.backbone.layers(stock.model.decoder)[-1].register_forward_hook(lambda *_: ran.append(1))
    tokens = len(pipe(pictures[0])["tokens"])
    stock(pictures[0], text="")
    assert 0 < len(ran) < tokens, "it exits early, too"


def test_captions_may_be_begun(folder, pictures):
    processor, model = AutoProcessor.from_pretrained(folder), make_captioner()
    assert isinstance(processor, ee.EarlyExitCaptionProcessor)
    texts = ["w5 w6", "w7x1"]
    batch = processor(images=pictures[:2], text=texts)
    assert batch["decoder_input_ids"].tolist() == [[START, 5, 6], [START, 7, 36]]
    together = model.generate(**batch)
    for row in range(2):
        alone = model.generate(**processor(images=pictures[row], text=texts[row]))[0]
        assert together[row, : len(alone)].tolist() == alone.tolist()
    begun = pipeline("image-text-to-text", model=folder)(pictures[0], text="w5 w6")[0]["generated_text"]
    assert begun == make_tokenizer().decode(together[0], skip_special_tokens=True)


def test_what_the_processor_refuses(pictures):
    processor = ee.EarlyExitCaptionProcessor(make_image_processor(), make_tokenizer())
    assert processor(images=pictures[0])["decoder_input_ids"].tolist() == [[START]]
    with pytest.raises(DataError, match="No pictures"):
        processor(images=[], text="")
    with pytest.raises(DataError, match="2 texts for 1 pictures"):
        processor(images=pictures[:1], text=["w5", "w6"])
    with pytest.raises(DataError, match="1 to 3 tokens"):
        processor(images=pictures[:2], text=["w5", "w5 w6 w7"])
    processor.tokenizer.cls_token = None
    with pytest.raises(UsageError, match="start_token_id"):
        processor(images=pictures[0])


def test_a_folder_of_stock_parts_needs_no_processor_file(tmp_path, pictures, folder):
    make_captioner().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    expected = essence(ee.pipeline(TASK, model=folder)(pictures))
    assert essence(ee.pipeline(TASK, model=tmp_path)(pictures)) == expected
    stock = pipeline("image-text-to-text", model=str(tmp_path))
    assert stock(pictures[0], text="")[0]["generated_text"].strip() == expected[0][0]


def test_importing_the_package_loads_no_pipeline_and_no_page():
    code = """
import sys, transformers
from transformers import AutoModelForImageTextToText, BertForSequenceClassification, VisionEncoderDecoderModel
from transformers.pipelines import PIPELINE_REGISTRY
before = set(sys.modules)
import hf_earlyexit
new = {name.partition(".")[0] for name in set(sys.modules) - before} - {"hf_earlyexit"}
heavy = new & {"PIL", "torchvision", "jinja2", "matplotlib", "datasets", "sklearn", "scipy"}
assert not heavy, heavy
assert not [name for name in ("pipelines", "images", "serving", "reports") if "hf_earlyexit." + name in sys.modules]
assert "early-exit-captioning" in PIPELINE_REGISTRY.get_supported_tasks()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-1500:]


# --- words --------------------------------------------------------------------------------------------------------


def test_a_word_is_as_deep_as_its_deepest_token():
    tokenizer = make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["w5", "w6", "##x1", "##x2", "w7", "[SEP]"])
    told = caption_entry(tokenizer, ids, [4, 1, 3, 2, 2, 1])
    assert told["generated_text"] == "w5 w6x1x2 w7"
    assert told["words"] == [
        {"word": "w5", "exit_layer": 4},
        {"word": "w6x1x2", "exit_layer": 3},
        {"word": "w7", "exit_layer": 2},
    ]
    assert told["exit_layers"] == [4, 1, 3, 2, 2, 1]
    assert told["mean_exit_layer"] == pytest.approx(13 / 6)
    assert caption_entry(tokenizer, [2], [4])["words"] == []
    assert caption_entry(tokenizer, [], [])["mean_exit_layer"] is None


class Pieces:
    """Decodes as some tokenizers do: a later token joins two words, and a letter comes in several tokens."""

    all_special_ids = (0,)
    pieces = ("", "do", " n", "'t", " caf", "\N{REPLACEMENT CHARACTER}", " .")

    def decode(self, ids, skip_special_tokens=True):
        text = "".join(self.pieces[token] for token in ids if token)
        return text.replace(" n't", "n't").replace("\N{REPLACEMENT CHARACTER}" * 2, "é").replace(" .", ".")

    def convert_ids_to_tokens(self, ids):
        return [str(token) for token in ids]


def test_tokens_that_join_words_belong_to_the_joined_one():
    told = caption_entry(Pieces(), [1, 2, 3, 4, 5, 5, 6, 0], [1, 5, 2, 3, 1, 4, 2, 6])
    assert told["words"] == [{"word": "don't", "exit_layer": 5}, {"word": "café.", "exit_layer": 4}]


def test_a_model_in_half_precision_gets_its_pictures_so(pictures):
    model = make_captioner().to(torch.bfloat16)
    pipe = ee.pipeline(TASK, model=model, tokenizer=make_tokenizer(), image_processor=make_image_processor())
    assert len(pipe(pictures, batch_size=3)) == len(pictures)
