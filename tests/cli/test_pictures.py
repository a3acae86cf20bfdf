"""Every command on pictures: folders of them, columns, names in files; what is trained is what is calibrated and served."""

import csv
import json

import pandas
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from tests.families.tiny import new_model, stock_of
from tests.serving.test_pictures import PROCESSOR, as_bytes

QUIET = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "--logging_strategy", "no"]
COLOURS = {"blue": (20, 40, 200), "green": (30, 180, 60), "red": (210, 30, 30)}


def draw(colour, number):
    """A picture of a colour, with a line that makes it like no other."""
    picture = Image.new("RGB", (20 + number, 24), COLOURS[colour])
    ImageDraw.Draw(picture).line((0, number, 20, 24 - number), fill=(number * 9, 200, 100), width=2)
    return picture


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for each split with a folder for each class, and the same rows as Parquet."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 16), ("validation", 6), ("test", 4)):
        rows = []
        for colour in COLOURS:
            (root / "photos" / split / colour).mkdir(parents=True)
            for number in range(count):
                picture = draw(colour, number)
                picture.save(root / "photos" / split / colour / f"{number:02d}.png")
                rows.append({"photo": as_bytes(picture), "label": list(COLOURS).index(colour), "label_text": colour})
        (root / "columns").mkdir(exist_ok=True)
        features = Features({"photo": ImageFeature(), "label": Value("int64"), "label_text": Value("string")})
        Dataset.from_list(rows, features=features).to_parquet(root / "columns" / f"{split}.parquet")
    return root


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    stock_of(new_model("vit"), "vit").save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory, data, plain):
    """Trained and calibrated from folders of pictures."""
    out = str(tmp_path_factory.mktemp("out") / "model")
    words = ["--held_back", "validation", "--max_steps", "24", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant"]
    assert main(["train", plain, "--dataset", str(data / "photos"), "--output_dir", out, *words, *QUIET]) == 0
    assert main(["calibrate", out, "--target", "speed-up:1.5", "--keep_weak_exits", "true"]) == 0
    return out


def told(capsys, *words):
    capsys.readouterr()
    status = main([*words, "--json", "true"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


def test_what_is_learned_from_folders_is_served_with_their_class_names(served):
    model = ee.from_pretrained(served)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    trace = ee.ExitTrace.load(f"{served}/held-back.safetensors")
    assert trace.num_rows == 18
    pictures = [draw(colour, number) for colour in COLOURS for number in range(6)]
    pipe = ee.pipeline("image-classification", model=served)
    assert [one[0]["label"] for one in pipe(pictures, early_exit=False)] == [c for c in COLOURS for _ in range(6)]
    expected = model.exit_policy.decide(model.exit_policy.scan(trace).scores)
    assert [one[0]["exit_layer"] for one in pipe(pictures)] == [model.exit_layers[index] for index in expected.tolist()]


def test_columns_teach_the_same_as_folders(served, data, plain, tmp_path):
    words = ["--held_back", "validation", "--max_steps", "24", "--learning_rate", "3e-3", "--lr_scheduler_type", "constant"]
    where = ["--dataset", str(data / "columns"), "--image_column", "photo", "--output_dir", str(tmp_path)]
    assert main(["train", plain, *where, *words, *QUIET]) == 0
    folders, columns = (ee.ExitTrace.load(f"{place}/held-back.safetensors") for place in (served, tmp_path))
    assert torch.allclose(folders.logits, columns.logits, atol=1e-5)
    assert ee.from_pretrained(tmp_path).config.id2label == {0: "blue", 1: "green", 2: "red"}


def test_evaluate_report_and_bench_read_folders_and_columns(served, data, tmp_path, capsys):
    columns = ["--dataset", str(data / "columns"), "--image_column", "photo"]
    found = told(capsys, "evaluate", served, *columns)
    folders = told(capsys, "evaluate", served, "--dataset", str(data / "photos"), "--time", "true", "--repeats", "1")
    assert found["rows"] == 12
    assert {name: folders[name] for name in found} == found
    page = tmp_path / "report.html"
    words = ["--split", "validation+test+validation", "--output", str(page)]
    told(capsys, "report", served, "--dataset", str(data / "photos"), *words)
    assert page.read_text().count("data:image/jpeg") == page.read_text().count('class="verdict"')
    bench = told(
        capsys,
        "bench",
        served,
        "--input",
        str(data / "photos"),
        "--repeats",
        "1",
        "--latency_rows",
        "1",
        "--forms",
        "fp32",
        "onnx",
    )
    assert bench["rows"] == {"count": 12, "mean_tokens": 5}


def test_predict_reads_pictures_folders_names_and_columns(served, data, tmp_path, capsys):
    test = data / "photos" / "test"
    files = sorted(test.glob("*/*.png"))
    expected = [one[0] for one in ee.pipeline("image-classification", model=served)([str(file) for file in files])]
    (test / "names.txt").write_text("".join(f"{file.relative_to(test)}\n" for file in files))
    pandas.DataFrame({"picture": [str(file.relative_to(test)) for file in files], "n": 3}).to_csv(test / "names.csv")
    try:
        for words in (
            ["--input", str(test / "names.txt")],
            ["--input", str(test / "names.csv")],
            ["--input", str(data / "photos")],
            ["--input", str(data / "columns" / "test.parquet"), "--image_column", "photo"],
        ):
            answers = told(capsys, "predict", served, *words)["answers"]
            assert [(one["label"], one["exit_layer"]) for one in answers] == [
                (one["label"], one["exit_layer"]) for one in expected
            ]
            for one in answers:
                name = one.get("image", one.get("picture", one.get("photo")))
                assert name is None or name.endswith(".png")
    finally:
        (test / "names.txt").unlink()
        (test / "names.csv").unlink()
    one = told(capsys, "predict", served, "--input", str(files[0]))["answers"]
    assert one == [{"image": files[0].name, "label": expected[0]["label"], "score": one[0]["score"],
                    "exit_layer": expected[0]["exit_layer"]}]  # fmt: skip
    out = tmp_path / "answers.csv"
    assert main(["predict", served, "--input", str(test / "red"), "--output", str(out)]) == 0
    with open(out) as file:
        assert [row["label"] for row in csv.DictReader(file)] == [row["label"] for row in expected[8:]]
    assert "4 pictures" in capsys.readouterr().out


def test_explain_and_recalibrate(served, data, capsys):
    file = data / "photos" / "test" / "red" / "00.png"
    found = told(capsys, "explain", served, "--image", str(file))
    assert found["text"] == "00.png"
    assert len(found["exits"]) == 3
    assert found["exit_layer"] == told(capsys, "predict", served, "--input", str(file))["answers"][0]["exit_layer"]
    words = ["--dataset", str(data / "photos"), "--operating_point", "again", "--target", "max-drop:0"]
    assert told(capsys, "recalibrate", served, *words)["operating_point"] == "again"


def test_a_row_that_is_no_picture_is_told_and_may_keep_its_place(served, tmp_path, capsys):
    draw("red", 1).save(tmp_path / "red.png")
    (tmp_path / "names.txt").write_text("red.png\nmissing.png\n")
    assert main(["predict", served, "--input", str(tmp_path / "names.txt")]) == 2
    assert "Row 1 cannot be read: There is no picture missing.png" in capsys.readouterr().err
    answers = told(capsys, "predict", served, "--input", str(tmp_path / "names.txt"), "--errors", "slot")["answers"]
    assert [one["error"] is None for one in answers] == [True, False]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["evaluate", "MODEL", "--dataset", "DATA/columns"], "Name the column with --image_column"),
        (["evaluate", "MODEL", "--dataset", "DATA/columns", "--image_column", "x"], "has no column 'x'; it has photo"),
        (["evaluate", "MODEL", "--dataset", "DATA/columns", "--image_column", "label"], "holds int64; expected pictures"),
        (["evaluate", "MODEL", "--dataset", "DATA/photos", "--text_column", "x"], "name their column with --image_column"),
        (["explain", "MODEL", "--text", "red"], "give it with --image, not --text"),
        (["explain", "MODEL"], "give the image with --image"),
        (["train", "MODEL", "--dataset", "DATA/photos", "--output_dir", "OUT", "--max_length", "5"], "have no max_length"),
        (["predict", "MODEL", "--input", "DATA/photos/nothing"], "no file or folder"),
        (["export", "onnx", "MODEL", "OUT/onnx", "--dataset", "DATA/photos"], "rows are for int8"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(words, error, served, data, tmp_path, capsys):
    places = {"MODEL": served, "DATA": str(data), "OUT": str(tmp_path)}
    for name, place in places.items():
        words = [word.replace(name, place) for word in words]
    assert main(words) == 2
    assert error in capsys.readouterr().err


def test_an_empty_folder_is_told(served, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["predict", served, "--input", str(tmp_path / "empty")]) == 2
    assert "pictures in a folder for each class" in capsys.readouterr().err


def test_exported_files_answer_as_the_model_that_they_came_from(served, data, tmp_path, capsys):
    """In 8 bits, with thresholds chosen on pictures held back; the image processor goes along."""
    out, photos = str(tmp_path / "onnx"), str(data / "photos")
    changed = told(capsys, "export", "onnx", served, out, "--int8", "true", "--dataset", photos)["changed"]
    assert changed["num_rows"] == 18
    answers = told(capsys, "predict", out, "--input", photos, "--split", "validation", "--output", str(tmp_path / "a.csv"))
    assert answers["mean_layers"] == pytest.approx(changed["after"]["mean_layers"])
    pictures = [draw(colour, number) for colour in COLOURS for number in range(6)]
    exported = ee.OnnxClassifier.from_pretrained(out)
    pipe = ee.pipeline("image-classification", model=exported, image_processor=PROCESSOR)
    assert [one[0]["label"] for one in pipe(pictures, early_exit=False)] == [c for c in COLOURS for _ in range(6)]
    layers = [one[0]["exit_layer"] for one in pipe(pictures)]
    assert sum(layers) / 18 == pytest.approx(answers["mean_layers"])
    assert ee.explain(exported, pictures[0], image_processor=PROCESSOR).exit_layer == layers[0]
