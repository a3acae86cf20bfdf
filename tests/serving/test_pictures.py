"""Pictures are rows like any others: read as what they are, each by itself, or refused by number."""

import io

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import DeiTImageProcessorPil as Processor

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from tests.families.tiny import IMAGES, new_model, tiny

PROCESSOR = Processor(size={"height": 16, "width": 16}, do_center_crop=False)


def pictures(count=12, seed=0):
    generator = np.random.default_rng(seed)
    sizes = generator.integers(9, 40, (count, 2))
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8).astype(np.uint8)) for size in sizes]


def pixels(images):
    return torch.cat([PROCESSOR(images=[one], return_tensors="pt")["pixel_values"] for one in images])


@pytest.fixture
def files(tmp_path):
    names = [tmp_path / f"{number:02d}.png" for number in range(12)]
    for name, picture in zip(names, pictures(), strict=True):
        picture.save(name)
    return names


def as_bytes(picture):
    file = io.BytesIO()
    picture.save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def column(images, decode=True):
    values = {"image": [as_bytes(one) for one in images], "label": list(range(3)) * 4}
    return Dataset.from_dict(values, features=Features({"image": ImageFeature(decode=decode), "label": Value("int64")}))


FORMS = {
    "files": lambda files: files,
    "names": lambda files: list(map(str, files)),
    "PIL": lambda files: pictures(),
    "arrays": lambda files: [np.asarray(one) for one in pictures()],
    "decoded column": lambda files: column(pictures()),
    "undecoded column": lambda files: column(pictures(), decode=False),
    "list of rows": lambda files: list(column(pictures())),
    "streamed column": lambda files: column(pictures()).to_iterable_dataset(),
    "column called img": lambda files: column(pictures()).rename_column("image", "img"),
    "transformed": lambda files: column(pictures()).with_transform(
        lambda batch: {"pixel_values": list(pixels([one.convert("RGB") for one in batch["image"]]))}
    ),
    "generator": lambda files: (one for one in pictures()),
    "columns": lambda files: {"image": pictures()},
    "pixel values": lambda files: {"pixel_values": pixels(pictures())},
    "rows of pixel values": lambda files: [{"pixel_values": one} for one in pixels(pictures())],
    "data set of pixel values": lambda files: Dataset.from_dict({"pixel_values": pixels(pictures()).numpy()}),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_pictures_gets_the_answers_of_the_stock_forward(form, files):
    model = tiny("vit")
    with torch.no_grad():
        expected = model(pixel_values=pixels(pictures())).logits
    assert len(expected.argmax(-1).unique()) > 1
    answers = ee.predict(model, FORMS[form](files), image_processor=PROCESSOR)
    assert torch.allclose(answers.logits, expected, atol=1e-5)
    streamed = list(ee.stream(model, FORMS[form](files), image_processor=PROCESSOR, window=5))
    assert torch.allclose(torch.stack([one.logits for one in streamed]), expected, atol=1e-5)
    trace = ee.collect_trace(model, FORMS[form](files), image_processor=PROCESSOR, labels=[0, 1, 2] * 4, progress=False)
    assert torch.allclose(trace.logits[:, -1], expected, atol=1e-5)
    assert trace.labels.tolist() == [0, 1, 2] * 4


def test_labels_of_an_image_column_are_found():
    trace = ee.collect_trace(tiny("vit"), column(pictures()), image_processor=PROCESSOR, progress=False)
    assert trace.labels.tolist() == [0, 1, 2] * 4
    named = {"image": pictures(), "label": [2] * 12}
    assert ee.collect_trace(tiny("vit"), named, image_processor=PROCESSOR, progress=False).labels.tolist() == [2] * 12


@pytest.mark.parametrize("name", IMAGES)
def test_calibrated_is_served_whatever_the_company(name):
    model, rows = new_model(name), pictures(60)
    trace = ee.collect_trace(model, rows, image_processor=PROCESSOR, labelled=False, progress=False)
    scores = ee.ConfidencePolicy(thresholds=[0.0] * (trace.num_exits - 1)).scan(trace).scores
    policy = ee.ConfidencePolicy(thresholds=scores[:, :-1].quantile(0.5, 0).tolist())
    model.set_exit_policy(policy)
    expected = [model.exit_layers[index] for index in policy.decide(policy.scan(trace).scores)]
    assert len(set(expected)) > 1
    for tokens in (1, 40, 512):
        answers = ee.predict(model, rows, image_processor=PROCESSOR, max_batch_tokens=tokens)
        assert answers.exit_layer.tolist() == expected
    explained = [ee.explain(model, row, image_processor=PROCESSOR).exit_layer for row in rows[:5]]
    assert explained == expected[:5]


def test_images_of_several_sizes_never_share_a_batch_where_the_model_takes_them():
    model = new_model("dinov2")
    sizes = [(16, 16), (24, 16), (16, 24), (16, 16), (32, 32)] * 3
    rows = [{"pixel_values": torch.randn(3, *size)} for size in sizes]
    answers = ee.predict(model, rows)
    trace = ee.collect_trace(model, rows, labelled=False, progress=False)
    with torch.no_grad():
        expected = torch.cat([model(pixel_values=row["pixel_values"][None]).logits for row in rows])
    assert torch.allclose(answers.logits, expected, atol=1e-5)
    assert torch.allclose(trace.logits[:, -1], expected, atol=1e-5)


@pytest.mark.parametrize("grey", ["L", "1", "LA", "P", "RGBA", "array", "array with an axis", "CMYK"], ids=lambda form: form)
def test_pictures_of_every_mode_are_read_in_colour(grey):
    lightness = np.random.default_rng(3).integers(0, 256, (20, 20), dtype=np.uint8)
    picture = Image.fromarray(lightness)
    forms = {"array": lightness, "array with an axis": lightness[..., None]}
    row = forms[grey] if grey in forms else picture.convert(grey)
    expected = picture if grey in forms else row
    answers = ee.predict(tiny("vit"), [row], image_processor=PROCESSOR)
    with torch.no_grad():
        assert torch.allclose(answers.logits, tiny("vit")(pixel_values=pixels([expected.convert("RGB")])).logits, atol=1e-5)


def broken(tmp_path):
    whole = as_bytes(pictures()[0])["bytes"]
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    return {
        "cut short": tmp_path / "cut.png",
        "no picture": tmp_path / "text.png",
        "missing": tmp_path / "missing.png",
        "a number": 7,
        "none": None,
        "empty column": {"bytes": None, "path": None},
        "other columns": {"text": "w5"},
        "wrong size": {"pixel_values": torch.zeros(3, 17, 16)},
        "one channel": {"pixel_values": torch.zeros(1, 16, 16)},
        "a batch": {"pixel_values": torch.zeros(1, 3, 16, 16)},
        "bytes": {"pixel_values": torch.zeros(3, 16, 16, dtype=torch.uint8)},
        "bare tensor": torch.zeros(3, 16, 16),
        "address": "https://example.org/cat.png",
    }


FAULTS = [
    "cut short", "no picture", "missing", "a number", "none", "empty column", "other columns", "wrong size", "one channel",
    "a batch", "bytes", "bare tensor", "address",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_is_no_picture_is_named_and_may_keep_its_place(fault, tmp_path):
    rows = [*pictures(2), broken(tmp_path)[fault], *pictures(2, seed=1)]
    for call in (
        lambda: ee.predict(tiny("vit"), rows, image_processor=PROCESSOR),
        lambda: ee.collect_trace(tiny("vit"), rows, image_processor=PROCESSOR, labelled=False, progress=False),
    ):
        with pytest.raises(DataError, match=r"Row 2[ :]"):
            call()
    answers = ee.predict(tiny("vit"), rows, image_processor=PROCESSOR, errors="slot")
    assert list(answers.errors) == [2]
    assert answers.reason[2] == "error"
    alone = ee.predict(tiny("vit"), rows[:2] + rows[3:], image_processor=PROCESSOR)
    assert torch.allclose(answers.logits[[0, 1, 3, 4]], alone.logits, atol=1e-5)


def test_a_broken_file_in_a_data_set_is_an_error_of_its_row_alone():
    whole = pictures()
    rows = Dataset.from_dict({"image": [as_bytes(whole[0]), {"bytes": b"broken", "path": None}, as_bytes(whole[1])]},
                             features=Features({"image": ImageFeature()}))  # fmt: skip
    answers = ee.predict(tiny("vit"), rows, image_processor=PROCESSOR, errors="slot")
    assert list(answers.errors) == [1]
    assert answers.reason[0] == answers.reason[2] == "last layer"


def test_what_does_not_suit_the_kind_of_rows_is_refused_in_words(tokenizer, tiny_model):
    images = pictures(2)
    for options, word in (
        ({"tokenizer": tokenizer}, "image_processor"),
        ({"max_length": 5}, "image_processor"),
        ({}, "Row 0"),
    ):
        with pytest.raises(UsageError, match=word):
            ee.predict(tiny("vit"), images, **options)
    with pytest.raises(UsageError, match="tokenizer"):
        ee.predict(tiny_model(), ["w5"], image_processor=PROCESSOR)
    with pytest.raises(DataError, match="Row 0"):
        ee.predict(tiny_model(), images, tokenizer=tokenizer)
    with pytest.raises(UsageError, match="expected a list"):
        ee.predict(tiny("vit"), "cat.png", image_processor=PROCESSOR)
    with pytest.raises(UsageError, match="type Image"):
        ee.predict(tiny("vit"), images[0], image_processor=PROCESSOR)
    with pytest.raises(DataError, match="No pictures among text"):
        ee.predict(tiny("vit"), {"text": ["w5"]}, image_processor=PROCESSOR)
    assert len(ee.predict(tiny("vit"), [], image_processor=PROCESSOR).logits) == 0


def test_a_budget_and_a_deadline_hold_for_pictures():
    answers = ee.predict(new_model("vit", exit_layers=[1, 2, 3]), pictures(), image_processor=PROCESSOR, layer_budget=2)
    assert answers.exit_layer.tolist() == [2] * 12
    late = ee.predict(tiny("vit"), pictures(), image_processor=PROCESSOR, deadline=0)
    assert late.reason == ["deadline"] * 12
    soon = ee.predict(tiny("vit"), pictures(), image_processor=PROCESSOR, deadline=60)
    assert soon.exit_layer.tolist() == [3] * 12
