"""There is one way by which pictures come in, and it turns them upright."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import hf_earlyexit as ee
from hf_earlyexit.captions.batches import image_batches
from hf_earlyexit.errors import DataError
from hf_earlyexit.images import open_image


@pytest.fixture
def lying(tmp_path):
    """A photo 40 x 20 that its EXIF turns by a quarter: red above, once upright."""
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def upright(picture):
    return picture.size == (20, 40) and picture.getpixel((10, 5)) == (255, 0, 0) and picture.mode == "RGB"


@pytest.mark.parametrize("form", ["name", "path", "image", "bytes of a column", "path of a column"])
def test_every_form_is_turned_upright(lying, form):
    given = {
        "name": lambda: str(lying),
        "path": lambda: lying,
        "image": lambda: Image.open(lying),
        "bytes of a column": lambda: {"bytes": lying.read_bytes(), "path": None},
        "path of a column": lambda: {"bytes": None, "path": str(lying)},
    }[form]()
    assert upright(open_image(given))


class Sizes:
    """An image processor that keeps the pictures it got."""

    def __init__(self):
        self.pictures = []

    def __call__(self, images, return_tensors="pt"):
        images = images if isinstance(images, list) else [images]
        self.pictures += images
        return {"pixel_values": torch.zeros(len(images), 3, 4, 4)}


class Words:
    eos_token_id = 2

    def __call__(self, texts, add_special_tokens=False):
        return {"input_ids": [[5] for _ in texts]}


def test_training_and_calibration_see_what_the_pipeline_sees(lying):
    seen = Sizes()
    list(image_batches([{"image": str(lying)}, Image.open(lying)], seen, 2))
    ee.captions.CaptionRows([{"image": str(lying), "captions": "5"}], seen, Words())[0]
    assert len(seen.pictures) == 3
    assert all(upright(picture) for picture in seen.pictures)


def test_arrays_are_pictures():
    assert open_image(np.zeros((5, 7), dtype=np.uint8)).size == (7, 5)
    assert open_image(np.zeros((5, 7, 3), dtype=np.uint8)).size == (7, 5)


@pytest.mark.parametrize("form", ["png", "tiff", "array", "big-endian array"])
def test_of_16_bits_the_upper_8_are_kept(form, tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    given = {"array": values, "big-endian array": values.astype(">u2")}.get(form)
    if given is None:
        given = tmp_path / f"deep.{form}"
        Image.fromarray(values).save(given)
    assert np.asarray(open_image(given))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32, np.int64])
def test_numbers_whose_range_nobody_knows_are_refused(kind):
    with pytest.raises(DataError, match=r"range of its own|no picture that Pillow"):
        open_image(np.full((3, 4), 0.5 if "float" in kind.__name__ else 300, dtype=kind))


@pytest.mark.parametrize(
    "wrong",
    [7, None, {"bytes": None}, {}, {"bytes": b"no picture"}, io.BytesIO, np.zeros((2, 2, 2, 2)), np.array(["a"]),
     np.zeros((0, 0, 3), np.uint8), Image.new("RGB", (0, 5))],
)  # fmt: skip
def test_what_is_none_is_refused_by_its_column(wrong):
    with pytest.raises(DataError, match=r"given as|no picture that Pillow") as caught:
        open_image(wrong, "photo")
    assert caught.value.field == "photo"
