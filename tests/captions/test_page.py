"""The page of captions: one file, true to its data, closed to hostile names, and no wider than a phone."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

import hf_earlyexit as ee
from hf_earlyexit.errors import DataError
from tests.reports.pages import HOSTILE, Page, browser_widths

LAYERS = 12


def caption(words, layers, end=LAYERS):
    """As the pipeline answers."""
    told = [{"word": word, "exit_layer": layer} for word, layer in zip(words, layers, strict=True)]
    passes = [*layers, end]
    return {
        "generated_text": " ".join(words),
        "tokens": [*words, "[SEP]"],
        "exit_layers": passes,
        "words": told,
        "mean_exit_layer": sum(passes) / len(passes),
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(3)]
    exif = Image.Exif()
    exif[0x010F] = "a secret camera"
    images[0].save(folder / "a&b<i>.jpg", exif=exif)
    images[0] = folder / "a&b<i>.jpg"
    captions = [caption(["a", "dog", "runs"], [12, 3, 1]), caption([HOSTILE, "W" * 200], [2, 7], 5), caption([], [], 12)]
    full = [*captions[:2], caption(["a", "full", "<b>answer</b>"], [12, 12, 12])]
    ee.captions.caption_page(images, captions, folder / "page.html", num_layers=LAYERS, full=full, title=HOSTILE)
    return folder, images, captions


@pytest.fixture(scope="module")
def html(made):
    return (made[0] / "page.html").read_text(encoding="utf-8")


def test_the_file_needs_nothing_else_and_runs_nothing(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert value.startswith("data:image/jpeg;base64,")
    assert not re.search(r"@import|url\(", html)


def test_hostile_words_and_names_are_shown_as_they_are(html):
    text = "".join(Page(html).text)
    assert '<script>alert("x")</script>' in text
    assert "{{ 7 * 7 }}" in text
    assert "a&b<i>.jpg" in text
    assert "full model: a full <b>answer</b>" in text


def test_every_word_wears_the_colour_of_its_layer(html, made):
    shown = re.findall(r'<span class="l(\d+)">(.*?)<small>(\d+)</small>', html)
    words = [word for one in made[2] for word in one["words"]]
    assert [int(layer) for layer, _, _ in shown] == [word["exit_layer"] for word in words]
    assert [layer for layer, _, _ in shown] == [layer for _, _, layer in shown]
    assert shown[1][1] == "dog"
    colours = re.findall(r"^\.l(\d+) \{ background: (#\w{6}); color: (#\w{6}); \}$", html, re.MULTILINE)
    assert [int(layer) for layer, _, _ in colours] == list(range(1, LAYERS + 1))
    lightness = [luminance(back) for _, back, _ in colours]
    assert lightness == sorted(lightness, reverse=True)
    assert min(contrast(back, front) for _, back, front in colours) >= 4.5  # what WCAG asks of text


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_figures_are_those_of_the_captions(html, made):
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))
    layers = [layer for one in made[2] for layer in one["exit_layers"]]
    assert facts["pictures"] == "3"
    assert facts[f"mean layers of {LAYERS}"] == f"{sum(layers) / len(layers):.2f}"
    assert facts["layer speed-up of the decoder"] == f"{LAYERS * len(layers) / sum(layers):.2f}x"
    assert facts["captions as by the full model"] == "2 of 3"
    shares = re.findall(r'<li class="l(\d+)">\d+<small>(\d+)%', html)
    assert [round(100 * layers.count(layer) / len(layers)) for layer in range(1, 13)] == [int(share) for _, share in shares]
    assert f"mean layer {sum([12, 3, 1, 12]) / 4:.2f}" in html


def test_pictures_are_small_and_tell_nothing_of_the_camera(html, made, tmp_path):
    found = [base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)]
    shown = [Image.open(io.BytesIO(data)) for data in found]
    assert [picture.size for picture in shown] == [(120, 90)] * 3
    assert not any(len(picture.getexif()) for picture in shown)
    assert b"secret" in made[1][0].read_bytes()
    assert not any(b"secret" in data for data in found)
    assert str(made[0]) not in html
    ee.captions.caption_page([Image.new("RGB", (4000, 2000))], [caption(["a"], [3])], tmp_path / "p.html", num_layers=12)
    data = re.search(r'base64,([^"]+)"', (tmp_path / "p.html").read_text())[1]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (560, 280)


@pytest.mark.parametrize("width", [320, 375, 1280])
def test_nothing_overflows_in_a_real_browser(width, html, tmp_path):
    assert browser_widths(html, width, tmp_path) == {"inner": width, "wants": width, "wide": []}


def test_what_does_not_fit_is_refused(tmp_path):
    picture, path = Image.new("RGB", (8, 8)), tmp_path / "p.html"
    with pytest.raises(DataError, match="No pictures"):
        ee.captions.caption_page([], [], path, num_layers=4)
    with pytest.raises(DataError, match="2 captions for 1 pictures"):
        ee.captions.caption_page([picture], [caption(["a"], [1])] * 2, path, num_layers=12)
    with pytest.raises(DataError, match="0 full for 1 pictures"):
        ee.captions.caption_page([picture], [caption(["a"], [1])], path, num_layers=12, full=[])
    with pytest.raises(DataError, match=r"left after layer 12; pass model\.exit_layers"):
        ee.captions.caption_page([picture], [caption(["a"], [1])], path, num_layers=4)
    with pytest.raises(DataError, match="There is no picture"):
        ee.captions.caption_page(["nowhere.png"], [caption(["a"], [1])], path, num_layers=12)
    assert not path.exists()
