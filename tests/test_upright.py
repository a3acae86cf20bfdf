"""What is calibrated is what is served: a photo that its camera turned is the same picture on every path."""

import json

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import pipeline

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.training.pictures import opened_rows
from tests.families.tiny import new_model
from tests.serving.test_pictures import PROCESSOR, pixels


@pytest.fixture
def upright():
    picture = Image.new("RGB", (20, 40), (10, 20, 200))
    picture.paste((250, 30, 20), (0, 0, 20, 12))
    return picture


@pytest.fixture
def photo(upright, tmp_path):
    """A file that holds the picture lying, and says so."""
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    exif = lying.getexif()
    exif[0x0112] = 6
    (tmp_path / "photos" / "red").mkdir(parents=True)
    lying.save(tmp_path / "photos" / "red" / "photo.png", exif=exif)
    return tmp_path / "photos" / "red" / "photo.png"


@pytest.fixture
def saved(tmp_path):
    model = new_model("vit")
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[None, None]))
    ee.save(model, tmp_path / "model", image_processor=PROCESSOR, card=False)
    return tmp_path / "model"


def test_every_path_sees_the_photo_upright(photo, upright, saved, tmp_path, capsys):
    model = ee.from_pretrained(saved).eval()
    with torch.inference_mode():
        expected = model(pixel_values=pixels([upright])).logits
        lying = model(pixel_values=pixels([upright.transpose(Image.Transpose.ROTATE_90)])).logits
    assert (expected - lying).abs().max() > 0.1
    features = Features({"image": ImageFeature(), "label": Value("int64")})
    column = Dataset.from_dict({"image": [str(photo)], "label": [0]}, features=features)
    column = column.map(lambda row: row)  # with bytes in it
    opened = {"file": [str(photo)], "path": [photo], "PIL": [Image.open(photo)], "column": column,
              "row": [{"image": {"bytes": photo.read_bytes(), "path": None}}],
              "streamed": column.to_iterable_dataset()}  # fmt: skip
    found = {}
    for name, rows in opened.items():
        found[f"predict, {name}"] = ee.predict(model, rows, image_processor=PROCESSOR).logits
        (answer,) = ee.stream(model, rows, image_processor=PROCESSOR)
        found[f"stream, {name}"] = answer.logits[None]
        trace = ee.collect_trace(model, rows, image_processor=PROCESSOR, labels=[0], progress=False)
        found[f"collect_trace, {name}"] = trace.logits[:, -1]
    for name, rows in (("list", [{"image": str(photo), "label": 0}]), ("column", column)):
        with torch.inference_mode():
            values = opened_rows(rows, "train_dataset", PROCESSOR)[0]["pixel_values"]
            found[f"trainer, {name}"] = model(pixel_values=values[None]).logits
    for name, logits in found.items():
        assert torch.allclose(logits, expected, atol=1e-5), name
    scores = expected.softmax(-1)[0].sort(descending=True).values.tolist()
    pipes = {name: make("image-classification", model=saved) for name, make in (("ours", ee.pipeline), ("stock", pipeline))}
    for name, pipe in pipes.items():
        for size in (None, 1) if name == "ours" else (1,):
            for given in (str(photo), [Image.open(photo)]):
                answer = pipe(given, batch_size=size)
                answer = answer[0] if isinstance(answer[0], list) else answer
                assert [one["score"] for one in answer] == pytest.approx(scores, abs=1e-5), name
    prediction = float(scores[0])
    assert ee.explain(model, photo, image_processor=PROCESSOR).exits[-1].score == pytest.approx(prediction, abs=1e-5)
    for place in (photo, photo.parents[1]):
        capsys.readouterr()
        assert main(["predict", str(saved), "--input", str(place), "--json", "true"]) == 0
        (told,) = json.loads(capsys.readouterr().out)["answers"]
        assert told["score"] == pytest.approx(prediction, abs=1e-5)
