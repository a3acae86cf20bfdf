"""Pages as a browser shows them: no word is broken on a phone, and a picture can be dropped."""

import base64
import io
import json
import re
import threading
from html import unescape
from importlib.resources import files

import pytest
import torch
import uvicorn
from fastapi.responses import HTMLResponse
from PIL import Image
from transformers import DeiTImageProcessorPil

import hf_earlyexit as ee
from hf_earlyexit.server.app import make_app
from hf_earlyexit.server.reference import reference_page
from tests.families.tiny import new_model

SECONDS = 100
WORDS = """<script>setInterval(() => {
  const broken = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[^\\s_-]+/g)) {
    if (["SCRIPT", "STYLE"].includes(walker.currentNode.parentNode.tagName)) continue;
    const range = document.createRange();
    range.setStart(walker.currentNode, word.index);
    range.setEnd(walker.currentNode, word.index + word[0].length);
    if (range.getClientRects().length > 1) broken.push(word[0]);
  }
  document.body.dataset.told = JSON.stringify({broken, wants: document.documentElement.scrollWidth, inner: innerWidth});
}, 50);</script>"""
DROP = """<script>
const files = new DataTransfer(), bytes = Uint8Array.from(atob("DATA"), (letter) => letter.charCodeAt(0));
files.items.add(new File([bytes], "picture.png", { type: "image/png" }));
at("form").dispatchEvent(new DragEvent("drop", { dataTransfer: files, cancelable: true }));
</script>"""


@pytest.fixture
def shown(chromium, tmp_path):
    """`shown(app, html, width, hash)`: the page in a browser, as one of the app's own."""
    running = []

    def show(app, html, width=375, at=""):
        @app.get("/shown")
        def page():
            return HTMLResponse(html)

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            assert thread.is_alive()
        port = server.servers[0].sockets[0].getsockname()[1]
        return chromium(tmp_path, width, "--dump-dom", f"http://127.0.0.1:{port}/shown{at}")

    yield show
    for server, thread in running:
        server.should_exit = True
        thread.join(SECONDS)


@pytest.fixture(scope="module")
def page():
    return files("hf_earlyexit.server").joinpath("page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["/", "/docs"])
def test_no_word_is_broken_on_a_phone(shown, page, tiny_model, open_policy, tokenizer, name):
    model = tiny_model(id2label={0: "negative", 1: "neutral", 2: "positive"})
    model.set_exit_policy(open_policy(model, "entropy"))
    with ee.Engine(model, tokenizer=tokenizer) as engine:
        app = make_app(engine, parts={"tokenizer": tokenizer})
        html = page if name == "/" else reference_page(app.openapi())
        told = shown(app, html + WORDS, at="#w5%20w6")
    assert json.loads(unescape(re.search('data-told="([^"]*)"', told)[1]))["broken"] == []
    assert ("Left after layer" in told) == (name == "/")


def test_a_picture_can_be_dropped(shown, page):
    vit = new_model("vit", id2label={0: "cat", 1: "dog", 2: "owl"})
    vit.set_exit_policy(ee.ConfidencePolicy(thresholds=(0.9, 0.1)))
    processor = DeiTImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False)
    noise = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(noise.numpy()).save(file, "png")
    expected = ee.predict(vit, [Image.open(file)], image_processor=processor)
    with ee.Engine(vit, image_processor=processor) as engine:
        app = make_app(engine, parts={"image_processor": processor})
        told = shown(app, page + DROP.replace("DATA", base64.b64encode(file.getvalue()).decode()))
    label = vit.config.id2label[int(expected.logits[0].argmax())]
    assert re.search(rf"<output[^>]*>{label} \(0\.\d+\)\. Left after layer {int(expected.exit_layer[0])} of 3: ", told)
    assert len(re.findall(r'<tr class="(?:left|after|)"><td', told)) == 3
