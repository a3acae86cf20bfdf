"""Files as people have them: every cell the text it is, splits of any columns, and errors that say what to do."""

import bz2
import gzip
import io
import json

import datasets
import pandas
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import hf_earlyexit as ee
from hf_earlyexit.data.formats import Reading
from hf_earlyexit.data.sources import Source
from hf_earlyexit.training.data import load_splits

SEPARATORS = "a\u2028b\x0bc\x0cd\x85e\u2029f\x1cg"  # each ends a line for str.splitlines, none in a file


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def written(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_tsv_is_cut_at_tabs(tmp_path):
    written(tmp_path / "train.tsv", "text\tlabel\ngood, really good film\t1\nbad plot\t0\n")
    rows = load_splits(str(tmp_path))["train"]
    assert rows[:] == {"text": ["good, really good film", "bad plot"], "label": [1, 0]}
    assert Source(str(tmp_path)).read()["label"][:] == ["1", "0"]


def test_cells_stay_the_texts_they_are(tmp_path):
    cells = ["NA", "", "null", "nan", "None", "2012", "1e5", "True", " a ", "007", SEPARATORS]
    place = written(tmp_path / "a.csv", "text,label\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells)))
    assert Source(place).read()[:] == {"text": cells, "label": [str(row) for row in range(len(cells))]}


@pytest.mark.parametrize(
    "form", ["csv", "tsv", "json", "jsonl", "ndjson", "parquet", "arrow", "csv.gz", "jsonl.gz", "tsv.bz2"]
)
def test_every_form_holds_the_same_rows(tmp_path, form):
    rows = {"text": ["good, film", SEPARATORS, 'say "no"'], "label": ["pos", "neg", "pos"]}
    frame, place = pandas.DataFrame(rows), tmp_path / f"rows.{form}"
    pack = {"gz": gzip.compress, "bz2": bz2.compress}.get(form.rpartition(".")[2], lambda data: data)
    plain = form.partition(".")[0]
    if plain in ("csv", "tsv"):
        written(place, pack(frame.to_csv(index=False, sep="," if plain == "csv" else "\t").encode()))
    elif plain in ("json", "jsonl", "ndjson"):
        written(place, pack(frame.to_json(orient="records", lines=plain != "json", force_ascii=False).encode()))
    elif plain == "parquet":
        frame.to_parquet(place)
    else:
        Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
        (next((tmp_path / "saved").glob("*.arrow"))).rename(place)
    assert Source(str(place)).read()[:] == rows


def test_a_folder_holds_a_split_a_file_whose_columns_differ(tmp_path):
    written(tmp_path / "train.csv", "text,label\nx,1\n")
    written(tmp_path / "dev.tsv", "text\tlabel\tid\ny\t0\t7\n")
    written(tmp_path / "test.jsonl", '{"text": "z"}\n')
    written(tmp_path / "my rows.csv", "text,label\nw,1\n")
    written(tmp_path / "notes.txt", "no rows")
    splits = load_splits(str(tmp_path))
    assert {name: rows.column_names for name, rows in splits.items()} == {
        "train": ["text", "label"], "dev": ["text", "label", "id"], "test": ["text"], "my_rows": ["text", "label"]
    }  # fmt: skip


def test_slices_sums_and_other_names_of_a_split(tmp_path):
    written(tmp_path / "train.csv", "text\n" + "".join(f"t{row}\n" for row in range(10)))
    written(tmp_path / "dev.csv", "text\nd0\nd1\n")
    source = Source(str(tmp_path))
    assert source.read("validation")["text"][:] == ["d0", "d1"]
    assert source.read("train[2:4]")["text"][:] == ["t2", "t3"]
    assert source.read("train[:20%]+val[1:]")["text"][:] == ["t0", "t1", "d1"]
    written(tmp_path / "val.csv", "text\nv\n")
    assert Source(str(tmp_path)).read("val")["text"][:] == ["v"]
    with pytest.raises(ee.EarlyExitError, match="has no split 'validation'; it has dev, train, val"):
        Source(str(tmp_path)).read("validation")


def test_a_file_is_one_split_whatever_a_command_reads_by_default(tmp_path):
    place = written(tmp_path / "rows.csv", "text\na\nb\n")
    assert Source(place).read(default="test")["text"][:] == ["a", "b"]
    assert Source(place).read("train[:1]")["text"][:] == Source(place).read("[:1]")["text"][:] == ["a"]
    with pytest.raises(ee.EarlyExitError, match="is one file, which has no split 'test'"):
        Source(place).read("test")


def test_folders_laid_out_like_the_hub_s(tmp_path):
    for number, text in enumerate("ab"):
        (tmp_path / "data").mkdir(exist_ok=True)
        pandas.DataFrame({"text": [text]}).to_parquet(tmp_path / "data" / f"train-0000{number}-of-00002.parquet")
    pandas.DataFrame({"text": ["c"], "label": [1]}).to_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet")
    source = Source(str(tmp_path))
    assert source.read("train")[:] == {"text": ["a", "b"]}
    assert source.read("dev")[:] == {"text": ["c"], "label": [1]}


def test_configurations_of_a_data_set(tmp_path):
    card = "---\nconfigs:\n- config_name: one\n  data_files: a.csv\n- config_name: two\n  data_files: b.csv\n---\n"
    written(tmp_path / "README.md", card)
    written(tmp_path / "a.csv", "text\nNA\n")
    written(tmp_path / "b.csv", "text\nb\n")
    assert Source(str(tmp_path), Reading(config="one")).read()[:] == {"text": ["NA"]}
    assert Source(str(tmp_path), Reading(config="two")).read()[:] == {"text": ["b"]}
    with pytest.raises(ee.EarlyExitError, match="--dataset_config"):
        Source(str(tmp_path))


def test_what_save_to_disk_left_keeps_its_class_names(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features=features)
    DatasetDict(train=rows).save_to_disk(tmp_path / "all")
    rows.save_to_disk(tmp_path / "one")
    for name in ("all", "one"):
        read = Source(str(tmp_path / name)).read("train[1:]")
        assert read["label"][:] == [0, 1]
        assert read.features["label"].names == ["neg", "pos"]


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\ncafé,1\n"), ("a.jsonl", '{"text": "café"}\n')])
def test_texts_in_another_encoding_are_read_as_told_and_refused_otherwise(tmp_path, name, content):
    place = written(tmp_path / name, content.encode("latin-1"))
    with pytest.raises(ee.EarlyExitError, match=r"not text in UTF-8.*--encoding latin-1"):
        Source(place).read()
    assert Source(place, Reading(encoding="latin-1")).read()["text"][:] == ["café"]
    place = written(tmp_path / f"bom-{name}", content.encode("utf-8-sig"))
    assert Source(place).read()["text"][:] == ["café"]


def test_a_file_that_changed_is_read_anew(tmp_path):
    place = written(tmp_path / "a.csv", "text\nold\n")
    assert Source(place).read()["text"][:] == ["old"]
    written(tmp_path / "a.csv", "text\nquite new\n")
    assert Source(place).read()["text"][:] == ["quite new"]


def test_lone_quotes_in_tsv_swallow_no_rows(tmp_path):
    place = written(tmp_path / "a.tsv", 'text\tlabel\n"a b\t1\nc" d\t0\n')
    with pytest.raises(ee.EarlyExitError, match="--quotes false"):
        Source(place).read()
    assert Source(place, Reading(quotes=False)).read()["text"][:] == ['"a b', 'c" d']
    place = written(tmp_path / "b.tsv", 'text\tlabel\n"a\nb"\t1\n')
    assert Source(place, Reading(quotes=True)).read()["text"][:] == ["a\nb"]


def test_standard_input_needs_a_form(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"text,label\nNA,1\n")))
    assert Source("-", Reading(format="csv")).read(default="test")[:] == {"text": ["NA"], "label": ["1"]}
    with pytest.raises(ee.EarlyExitError, match="--input_format"):
        Source("-").read()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "has no rows"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "text,label\na,b,1\nc,d,2\n", "more cells than the header"),
        ("a.csv", "text,label\na,1\nc,d,2\n", "Expected 2 fields in line 3, saw 3"),
        ("a.csv", "text;label\na;1\n", "seems to be separated by ';'"),
        ("a.csv", "text\tlabel\na\t1\n", "--input_format tsv"),
        ("a.csv.gz", "text\n", "Not a gzipped file"),
        ("a.jsonl", '{"text": "a"}\n{"text":\n', "JSON parse error"),
        ("a.parquet", "PAR1", "Check that the file is whole"),
        ("a.arrow", "x", "Check that the file is whole"),
        ("a.xlsx", "x", "is a .xlsx; expected one of .csv"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_else_is_printed(tmp_path, name, content, message, capfd):
    place = written(tmp_path / name, content)
    with pytest.raises(ee.EarlyExitError, match=message) as caught:
        Source(place).read()
    assert place in str(caught.value)
    assert "rror" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [("nobody/nothing", "the Hub does not give it"), ("./a.csv", "There is no file"), ("b.tsv", "There is no file")],
)
def test_what_is_not_there(name, message):
    with pytest.raises(ee.EarlyExitError, match=message):
        Source(name)


def test_two_files_of_one_split_are_refused(tmp_path):
    written(tmp_path / "train.csv", "text\na\n")
    written(tmp_path / "train.jsonl", json.dumps({"text": "a"}))
    with pytest.raises(ee.EarlyExitError, match=r"two files for the split 'train': train.csv and train.jsonl"):
        Source(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoding": "latin-99"}, "Python does not know"),
        ({"separator": "::"}, "one character"),
        ({"format": "xml"}, "one of csv"),
    ],
)
def test_readings_that_cannot_be(fields, message):
    with pytest.raises(ee.EarlyExitError, match=message):
        Reading(**fields)
