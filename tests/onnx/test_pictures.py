"""Exported image classifiers: of the one size that their image processor makes, and what else they refuse in words."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessorPil as Processor

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError, UsageError
from hf_earlyexit.onnx.inputs import picture_shape
from tests.families.tiny import new_model, tiny

SIZE = {"height": 24, "width": 16}  # dinov2's config says 16 x 16, and fits its positions to every image
PROCESSOR = Processor(size=SIZE, do_center_crop=False)
PICTURES = [Image.fromarray(np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)) for seed in range(12)]


@pytest.fixture(scope="module")
def model():
    model = new_model("dinov2", num_hidden_layers=2)
    with torch.inference_mode():
        pixels = PROCESSOR(images=PICTURES, return_tensors="pt")["pixel_values"]
        sure = model(pixel_values=pixels, early_exit=False).exit_logits[:, 0].softmax(-1).amax(-1).sort().values
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[float(sure[5:7].mean())]))
    return model


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    ee.export_onnx(model, folder, forms=["layers"], image_processor=PROCESSOR)
    return ee.OnnxClassifier.from_pretrained(folder, threads=1)


def test_the_image_processor_says_what_size_pictures_have(model, served):
    expected, answers = (ee.predict(each, PICTURES, image_processor=PROCESSOR) for each in (model, served))
    assert set(expected.exit_layer.tolist()) == {1, 2}
    assert torch.equal(answers.exit_layer, expected.exit_layer)
    assert (answers.logits - expected.logits).abs().max() <= 1e-4
    pixels = PROCESSOR(images=PICTURES, return_tensors="np")["pixel_values"]
    assert torch.equal(served(pixel_values=pixels).exit_layer, expected.exit_layer)
    assert served(pixel_values=pixels[:0]).logits.shape == (0, 3)
    with ee.Engine(served, image_processor=PROCESSOR) as engine:
        assert [row.result().exit_layer for row in map(engine.submit, PICTURES)] == expected.exit_layer.tolist()
    bad = Processor(size={"height": 16, "width": 16}, do_center_crop=False)
    rows = [{"pixel_values": pixels[0]}, {"pixel_values": bad(images=PICTURES[:1], return_tensors="np")["pixel_values"][0]}]
    mixed = ee.predict(served, rows, errors="slot")
    assert torch.equal(mixed.exit_layer[:1], expected.exit_layer[:1])
    assert str(mixed.errors[1]).startswith("Row 1 has pixel_values of shape [3, 16, 16]; this export takes")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"pixel_values": torch.zeros(2, 3, 16, 16)}, DataError, r"\[2, 3, 16, 16\]; expected \[pictures, 3, 24, 16\]"),
        ({"pixel_values": torch.zeros(3, 24, 16)}, DataError, r"\[3, 24, 16\]; expected \[pictures, 3, 24, 16\]"),
        ({"pixel_values": torch.zeros(1, 3, 24, 16).byte()}, DataError, "no image processor has prepared"),
        ({"input_ids": torch.ones(1, 4).long()}, UsageError, "has input_ids; this model reads pictures: pass pixel_values="),
        ({}, UsageError, "nothing to read; this model reads pictures"),
    ],
)
def test_other_inputs_are_refused_in_words(served, given, kind, words):
    with pytest.raises(kind, match=words):
        served(**given)


def test_image_processors_that_do_not_fit_are_refused_before_anything_is_traced(tmp_path):
    assert picture_shape(tiny("vit"), None) == (3, 16, 16)
    with pytest.raises(UsageError, match=r"makes other pictures than the model takes: .*expected \[images, 3, 16, 16\]"):
        ee.export_onnx(tiny("vit"), tmp_path, forms=["layers"], image_processor=PROCESSOR)
    with pytest.raises(UsageError, match="reads texts: pass tokenizer="):
        ee.export_onnx(tiny("bert"), tmp_path, forms=["layers"], image_processor=PROCESSOR)
