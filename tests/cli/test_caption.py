"""`hf-earlyexit caption`: pictures on the command line, captions with their layers on standard output."""

import json

import pytest

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from tests.captions.toy import essence, make_captioner, make_pictures, make_tokenizer, save_all
from tests.hub.toy import make_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caption")
    save_all(folder / "model")
    (folder / "photos").mkdir()
    for number, picture in enumerate(make_pictures()):
        picture.save(folder / "photos" / f"{number}.png")
    (folder / "photos" / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    """Text and layers of all pictures, by the pipeline, for any options."""
    pipe = ee.pipeline("early-exit-captioning", model=folder / "model")
    pictures = sorted((folder / "photos").glob("*.png"))
    return lambda **options: essence(pipe(pictures, **options))


def found(capsys, *words):
    assert main(["caption", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ([], {}),
        (["--batch_size", "4"], {}),
        (["--num_beams", "3"], {"num_beams": 3}),
        (["--operating_point", "fast", "--max_new_tokens", "5"], {"operating_point": "fast", "max_new_tokens": 5}),
        (["--early_exit", "false"], {"early_exit": False}),
    ],
)
def test_json_is_what_the_pipeline_answers(folder, expected, capsys, words, options):
    told = found(capsys, folder / "model", folder / "photos", *words)
    assert essence(told["captions"]) == expected(**options)
    layers = [layer for one in told["captions"] for layer in one["exit_layers"]]
    assert told["mean_exit_layer"] == pytest.approx(sum(layers) / len(layers))
    assert (told["images"], told["num_layers"]) == (6, 4)
    assert [one["image"] for one in told["captions"]] == [str(folder / "photos" / f"{n}.png") for n in range(6)]


def test_words_name_their_layers_and_a_page_is_written(folder, expected, capsys, tmp_path):
    photos = [str(folder / "photos" / f"{number}.png") for number in (2, 0)]
    page = tmp_path / "page.html"
    assert main(["caption", str(folder / "model"), *photos, "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    text, layers = expected()[2]
    told = " ".join(word.split("/")[0] for word in lines[0].removeprefix("2.png: ").split("  ")[0].split())
    assert told == (text or "nothing")
    assert lines[0].endswith(f"(mean layer {sum(layers) / len(layers):.2f} of 4)")
    assert lines[1].startswith("0.png: ")
    assert lines[2:] == [f"saved {page}"]
    assert "Captions by model" in page.read_text()
    assert page.read_text().count("<img ") == 2


def test_pictures_may_be_named_by_their_flag_or_a_recipe(folder, expected, capsys, tmp_path):
    photos = folder / "photos"
    (tmp_path / "recipe.yaml").write_text(f"model: {folder / 'model'}\nimages: ['{photos / '0.png'}']\nnum_beams: 2\n")
    by_recipe = found(capsys, "--config", tmp_path / "recipe.yaml")
    by_flag = found(capsys, folder / "model", "--images", photos / "0.png", "--num_beams", 2)
    assert essence(by_recipe["captions"]) == essence(by_flag["captions"]) == expected(num_beams=2)[:1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}"], "No pictures: name files or folders"),
        (["{model}", "nowhere.png"], "There is no picture nowhere.png"),
        (["{model}", "{model}"], "holds no picture"),
        (["{model}", "{photos}/notes.txt"], "no picture that Pillow can read"),
        (["{model}", "{photos}", "--batch_size", "0"], "batch_size is 0"),
        (["{model}", "{photos}", "--operating_point", "fats"], "Did you mean 'fast'"),
        (["{model}", "{photos}", "--operating_point", "fast", "--early_exit", "false"], "contradicts"),
        (["{model}", "{photos}", "--beams", "2"], "Did you mean --num_beams"),
        (["{classifier}", "{photos}"], "EarlyExitBertForSequenceClassification, which this command is not for"),
        (["{unfinished}", "{photos}"], "holds no image processor"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, tmp_path, capsys, words, message):
    if "{classifier}" in words:
        make_model().save_pretrained(tmp_path / "classifier")
    if "{unfinished}" in words:
        ee.save(make_captioner(), tmp_path / "unfinished", tokenizer=make_tokenizer(), card=False)
    places = {"model": folder / "model", "photos": folder / "photos"}
    places |= {name: tmp_path / name for name in ("classifier", "unfinished")}
    capsys.readouterr()
    assert main(["caption", *(word.format(**places) for word in words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err.splitlines()[-1]
    assert "Traceback" not in told.err


def test_other_commands_say_that_a_captioner_is_not_for_them(folder, capsys):
    assert main(["explain", str(folder / "model"), "--text", "w5"]) == 2
    assert "EarlyExitVisionEncoderDecoder, which this command is not for" in capsys.readouterr().err
    assert main(["predict", str(folder / "model"), "photo.png", "--input", "-"]) == 2
    assert "photo.png" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["caption", "--help"])
    assert stop.value.code == 0
    told = capsys.readouterr().out
    assert "hf-earlyexit caption captioner beach.jpg dog.png" in told
    assert "--num_beams" in told
