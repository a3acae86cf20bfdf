"""An image classifier is saved, described and judged like any other model; its card speaks of pictures."""

import re

import pytest
import torch
from huggingface_hub import ModelCard

import hf_earlyexit as ee
from hf_earlyexit.errors import UsageError
from tests.families.tiny import new_model
from tests.serving.test_pictures import PROCESSOR, pictures


@pytest.fixture(scope="module")
def made():
    """A model whose labels are its own answers, and its calibration."""
    model, rows = new_model("vit"), pictures(60, seed=2)
    labels = ee.predict(model, rows, image_processor=PROCESSOR).logits.argmax(-1).tolist()
    trace = ee.collect_trace(model, rows, image_processor=PROCESSOR, labels=labels, progress=False)
    result = ee.calibrate(trace, "confidence", ee.LayerBudget(2.4), keep_weak_exits=True)
    model.set_exit_policy(result)
    return model, result


@pytest.fixture
def folder(made, tmp_path):
    model, result = made
    rows = pictures(20, seed=3)
    labels = ee.predict(model, rows, image_processor=PROCESSOR, early_exit=False).logits.argmax(-1).tolist()
    figures = ee.hub.card_figures(model, result, rows, image_processor=PROCESSOR, labels=labels, repeats=1, progress=False)
    card = {"license": "mit", "evaluated_on": "someone/photos", "datasets": ["someone/photos"], **figures}
    ee.save(model, tmp_path / "model", image_processor=PROCESSOR, calibration=result, card=card, repo_id="me/pictures")
    return tmp_path / "model"


def test_the_card_speaks_of_pictures_and_names_their_widget(folder):
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.metrics == ["accuracy"]
    assert not re.search(r"\btexts?\b", card.text)
    for words in ("An image classifier", "It tells apart 3 labels", "A picture leaves where", "pictures like those rows",
                  "AutoModelForImageClassification", "20 images"):  # fmt: skip
        assert words in card.text
    assert (folder / ".eval_results" / "default.yaml").is_file()


def test_the_cards_code_runs_on_files(folder, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(import hf_earlyexit.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name, picture in zip(("one.jpg", "another.jpg"), pictures(2), strict=True):
        picture.save(name)
    space = {}
    exec(code.replace("me/pictures", str(folder)).replace("\npipe([", "\nanswers = pipe(["), space)
    assert [set(one[0]) for one in space["answers"]] == [{"label", "score", "exit_layer", "exit_score"}] * 2


def test_what_is_loaded_again_answers_the_same(folder, made):
    rows = pictures()
    pipe = ee.pipeline("image-classification", model=folder)
    expected = ee.predict(made[0], rows, image_processor=PROCESSOR)
    found = ee.predict(pipe.model, rows, image_processor=pipe.image_processor)
    assert torch.equal(found.logits, expected.logits)
    assert found.exit_layer.tolist() == expected.exit_layer.tolist()


def test_what_a_classifier_does_not_read_with_is_not_saved_beside_it(made, tmp_path, tiny_model, tokenizer):
    with pytest.raises(UsageError, match="reads pictures; leave the tokenizer out"):
        ee.save(made[0], tmp_path / "a", tokenizer=tokenizer, image_processor=PROCESSOR)
    with pytest.raises(UsageError, match="reads texts; leave the image processor out"):
        ee.save(tiny_model(), tmp_path / "b", tokenizer=tokenizer, image_processor=PROCESSOR)
    assert not list(tmp_path.iterdir())
