"""The stock pipeline of images exits early; ours also tells where, and takes whatever `predict` takes."""

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from tests.families.tiny import IMAGES, new_model
from tests.serving.test_pictures import PROCESSOR, as_bytes, broken, column, pictures

TASK = "image-classification"


def with_policy(name):
    """A tiny model some of whose random pictures leave early."""
    model = new_model(name)
    trace = ee.collect_trace(model, pictures(), image_processor=PROCESSOR, labelled=False, progress=False)
    scores = ee.ConfidencePolicy(thresholds=[0.0] * (trace.num_exits - 1)).scan(trace).scores[:, :-1].sort(0).values
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=((scores[5] + scores[6]) / 2).tolist()))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    ee.save(with_policy("vit"), folder, image_processor=PROCESSOR, card=False)
    return folder


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("batch_size", [None, 1, 5])
def test_answers_are_the_stock_pipelines_and_layers_those_of_predict(name, batch_size):
    model = with_policy(name)
    stock = pipeline(TASK, model=model, image_processor=PROCESSOR)
    ours = ee.pipeline(TASK, model=model, image_processor=PROCESSOR)
    expected, found = stock(pictures(), batch_size=batch_size or 1), ours(pictures(), batch_size=batch_size)
    assert [[one["label"] for one in row] for row in found] == [[one["label"] for one in row] for row in expected]
    scores = [[[one["score"] for one in row] for row in answers] for answers in (found, expected)]
    assert np.allclose(*scores, atol=1e-5)
    layers = ee.predict(model, pictures(), image_processor=PROCESSOR).exit_layer.tolist()
    assert [row[0]["exit_layer"] for row in found] == layers
    assert len(set(layers)) > 1


FORMS = {
    "column": column,
    "streamed": lambda images: column(images).to_iterable_dataset(),
    "columns": lambda images: {"image": images},
    "frame": lambda images: pd.DataFrame({"image": [as_bytes(one) for one in images]}),
    "rows": lambda images: list(column(images)),
    "tuple": tuple,
    "keyed": lambda images: KeyDataset(column(images), "image"),
    "generator": lambda images: (one for one in images),
    "pixel values": lambda images: {
        "pixel_values": torch.cat([PROCESSOR(images=[one], return_tensors="pt")["pixel_values"] for one in images])
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [None, 4])
def test_every_form_of_rows_gets_the_same_answers(form, batch_size, saved):
    pipe = ee.pipeline(TASK, model=saved, top_k=1)
    expected, found = pipe(pictures()), list(pipe(FORMS[form](pictures()), batch_size=batch_size))
    assert [row[0]["exit_layer"] for row in found] == [row[0]["exit_layer"] for row in expected]
    assert [row[0]["score"] for row in found] == pytest.approx([row[0]["score"] for row in expected], abs=1e-5)


def test_one_picture_in_any_form_gets_one_answer(saved, tmp_path):
    pipe, picture = ee.pipeline(TASK, model=saved), pictures()[0]
    picture.save(tmp_path / "one.png")
    expected = pipe([picture])[0]
    for given in (picture, str(tmp_path / "one.png"), {"image": picture}, as_bytes(picture)):
        found = pipe(given)
        assert [one["exit_layer"] for one in found] == [one["exit_layer"] for one in expected]
        assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert ee.pipeline(TASK, model=saved, early_exit=False)(picture)[0]["exit_layer"] == 3


@pytest.mark.parametrize("fault", ["cut short", "text.png", "missing", "a number", "none", "wrong size", "address"])
def test_a_row_that_is_no_picture_is_named(fault, saved, tmp_path):
    bad = {"text.png": "no picture"}.get(fault, fault)
    pipe, rows = ee.pipeline(TASK, model=saved), [*pictures(2), broken(tmp_path)[bad], pictures(1)[0]]
    with pytest.raises(DataError, match="Row 2"):
        pipe(rows)
    with pytest.raises(DataError, match=r"The row|pixel_values has shape"):
        pipe(rows[2:], batch_size=1)


def test_what_cannot_work_is_refused_in_words(saved, tmp_path, tiny_model, tokenizer):
    model = with_policy("vit")
    model.save_pretrained(tmp_path)
    for task, given, error, words in (
        (TASK, tmp_path, ee.EarlyExitError, "no image processor"),
        (TASK, model, UsageError, "has no image_processor"),
        ("text-classification", saved, UsageError, "ViTForImageClassification, which is for another task"),
        ("text-classification", model, UsageError, r"another task: ee.pipeline\('image-classification'"),
        ("early-exit-captioning", saved, UsageError, "another task"),
        (TASK, tiny_model(), UsageError, r"another task: ee.pipeline\('text-classification'"),
    ):
        with pytest.raises(error, match=words):
            ee.pipeline(task, model=given)
    pipe = ee.pipeline(TASK, model=saved)
    with pytest.raises(UsageError, match=r"takes no 'tok_k'. Did you mean 'top_k'"):
        pipe(pictures(1), tok_k=1)
    with pytest.raises(ee.EarlyExitError, match="operating point"):
        pipe(pictures(1), operating_point="fast")
