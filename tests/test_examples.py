"""Examples run from beginning to end, and what they print is true."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, BertModel

import hf_earlyexit as ee

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")  # as Trainer warns without a GPU


@pytest.fixture
def printed(monkeypatch, capsys, tmp_path):
    """`printed(name, *words)`: what an example prints when it is started with these words, in a folder of its own."""

    def run(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.slow
def test_the_demo_tells_the_truth(printed, tmp_path, tiny_config, tokenizer, random_texts):
    """On a tiny model and made-up texts; `make demo` runs it on real ones."""
    BertModel(tiny_config()).save_pretrained(tmp_path / "bert")
    config = (tmp_path / "bert" / "config.json").read_text().replace("early_exit_bert", "bert")
    (tmp_path / "bert" / "config.json").write_text(re.sub(r'\s*"early_exit_version": "[^"]*",?', "", config))
    tokenizer.save_pretrained(tmp_path / "bert")
    (tmp_path / "data").mkdir()
    for seed, (split, count) in enumerate((("train", 300), ("validation", 200), ("test", 100))):
        lines = [f"{text},{int(int(text.split()[0][1:]) > 50)}" for text in random_texts(count, seed=seed, longest=4)]
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    words = ["--model", tmp_path / "bert", "--dataset", tmp_path / "data", "--out", tmp_path / "out", "--epochs", "2"]
    out = printed("demo.py", *words)
    table = {line.split("  ")[0]: line for line in out.splitlines()}
    for name in ("full model", "confidence", "patience", "beem-a", "beem-c", "beem-calibrated", "static"):
        assert name in table
    assert table["full model"].split()[4] == "1.00x"
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "out")
    texts = [line.rsplit(",", 1)[0] for line in (tmp_path / "data" / "test.csv").read_text().splitlines()[1:]]
    answers = ee.predict(model, texts, tokenizer=tokenizer)
    mean = float(answers.exit_layer.double().mean())
    told = re.search(r"^beem-calibrated\s+(\S+)\s+(\S+)", out, re.MULTILINE)
    assert float(told[2]) == pytest.approx(mean, abs=0.02)
    layers = [int(line.split()[1]) for line in out.splitlines() if re.match(r"layer \d", line)]
    assert layers == answers.exit_layer[:5].tolist()


@pytest.mark.slow
def test_learning_when_to_leave_runs_through_all_phases_and_is_taken_up_again(printed, tmp_path, random_texts):
    (tmp_path / "data").mkdir()
    for seed, (split, count) in enumerate((("train", 200), ("validation", 100), ("test", 60))):
        lines = [f"{text},{int(int(text.split()[0][1:]) > 50)}" for text in random_texts(count, seed=seed, longest=4)]
        (tmp_path / "data" / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    words = ["--dataset", tmp_path / "data", "--out", tmp_path / "out"]
    first, again = (printed("consistentee.py", *words) for _ in range(2))
    tables = [out[out.index("\nphase") :] for out in (first, again)]
    assert tables[0] == tables[1]  # nothing was trained anew
    assert all(f"\n{name}" in tables[0] for name in ("01-exits", "02-hardness", "03-gates", "04-chosen", "one half"))
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.exit_policy == ee.policies.GatePolicy.half(4, exit_layers=model.exit_policy.exit_layers)


@pytest.mark.slow
def test_the_captions_of_the_example_are_those_of_the_pipeline(printed, tmp_path):
    out = printed("caption.py", "--out", tmp_path / "out", "--steps", "30")
    shares = re.search(r"share of right words at each exit: (.*)", out)[1].split()
    assert len(shares) == 6
    assert float(shares[-1]) > 0.4  # thirty steps teach little; by default it takes more
    assert len(re.findall(r"^\d\.\d\d(?: [\w\[\]]+/\d)*$", out, re.MULTILINE)) == 12
    assert (tmp_path / "out" / "captions.html").read_text().count("<img ") == 12
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    out = printed("caption.py", "--model", tmp_path / "out", "--images", picture, "--out", tmp_path / "page")
    answer = ee.pipeline("early-exit-captioning", model=tmp_path / "out")(picture)
    words = " ".join(f"{word['word']}/{word['exit_layer']}" for word in answer["words"])
    assert f"{answer['mean_exit_layer']:.2f} {words}".strip() in out
    assert picture.name in (tmp_path / "page" / "captions.html").read_text()


@pytest.mark.slow
def test_the_pictures_of_the_example_leave_where_it_says(printed, tmp_path):
    for seed, (sides, number) in enumerate([(3, 200), (24, 200)]):
        folder = tmp_path / "data" / ("triangle", "circle")[seed]
        folder.mkdir(parents=True)
        for place in range(number):
            picture = Image.new("RGB", (32, 32), "#777777")
            ImageDraw.Draw(picture).regular_polygon((16, 16, 8 + place % 8), sides, fill=("red", "blue")[seed])
            picture.save(folder / f"{place:03d}.png")
    words = ["--dataset", tmp_path / "data", "--out", tmp_path / "out", "--steps", "20"]
    out = printed("images.py", *words)
    full, early, layers = re.search(r"full model (\S+), early (\S+) after (\S+) layers", out).groups()
    assert float(full) > 0.9
    assert float(early) >= 0.9
    assert 1 <= float(layers) < 6
    leavings = re.findall(r"^layer (\d)  (\w+) \((\d\.\d\d)\), really (\w+)$", out, re.MULTILINE)
    assert len(leavings) == 8
    assert {really for *_, really in leavings} <= {"triangle", "circle"}
    model = ee.from_pretrained(tmp_path / "out")
    pictures = sorted((tmp_path / "data").glob("*/*.png"))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    answers = ee.predict(model, pictures, image_processor=processor)
    assert {int(layer) for layer, *_ in leavings} <= set(answers.exit_layer.tolist())
    assert (tmp_path / "out" / "report.html").is_file()
