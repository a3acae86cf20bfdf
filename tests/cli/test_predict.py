"""predict: rows in from any file, answers out into any file, in step, and on again where a run was stopped."""

import csv
import gzip
import io
import itertools
import json

import pandas
import pytest
from datasets import Dataset

import hf_earlyexit as ee
from hf_earlyexit.cli import incoming, outgoing, predict
from hf_earlyexit.cli.main import main
from tests.hub.toy import make_all, texts

SEPARATORS = "w5\u2028w6\x0bw7\x0cw8\x85w9\u2029w10\x1cw11"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict") / "model"
    made, tokenizer, results = make_all()
    ee.save(made, folder, tokenizer=tokenizer, calibration=results, card=False)
    return str(folder)


@pytest.fixture(scope="module")
def right(model):
    """`right(texts)`: labels and layers by `ee.predict`."""
    made, tokenizer, _ = make_all()

    def answer(rows):
        answers = ee.predict(made, rows, tokenizer=tokenizer)
        names = [made.config.id2label[number] for number in answers.logits.argmax(-1).tolist()]
        return list(zip(names, answers.exit_layer.tolist(), strict=True))

    return answer


def answered(capsys, *words):
    assert main(["predict", *map(str, words)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n")[:-1]]


def pairs(rows):
    return [(row["label"], row["exit_layer"]) for row in rows]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_ends_with_a_line_feed_and_with_nothing_else(model, right, tmp_path, capsys, monkeypatch, end):
    rows = [SEPARATORS, "", "w12 w13"]
    (tmp_path / "texts.txt").write_bytes((end.join(rows) + end).encode())
    found = answered(capsys, model, "--input", tmp_path / "texts.txt")
    assert [row["text"] for row in found] == rows
    assert pairs(found) == right(rows)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(end.join(rows).encode())))
    assert answered(capsys, model, "--input", "-") == found


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "json", "parquet", "arrow", "csv.gz", "jsonl.gz"])
def test_every_form_is_read_with_its_ids_and_other_columns(model, right, tmp_path, capsys, form):
    rows = pandas.DataFrame({"id": ["007", "8"], "body": [SEPARATORS, "NA"], "label": ["x", "y"]})
    plain, _, packed = form.partition(".")
    place = tmp_path / f"rows.{form}"
    if plain in ("csv", "tsv"):
        data = rows.to_csv(index=False, sep="," if plain == "csv" else "\t").encode()
        place.write_bytes(gzip.compress(data) if packed else data)
    elif plain in ("jsonl", "json"):
        data = rows.to_json(orient="records", lines=plain == "jsonl", force_ascii=False).encode()
        place.write_bytes(gzip.compress(data) if packed else data)
    elif plain == "parquet":
        rows.to_parquet(place)
    else:
        Dataset.from_pandas(rows).save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(place)
    found = answered(capsys, model, "--input", place, "--text_column", "body")
    assert [(row["id"], row["body"], row["input_label"]) for row in found] == list(rows.itertuples(index=False, name=None))
    assert pairs(found) == right(rows["body"].tolist())


@pytest.mark.parametrize(
    ("form", "content"), [("csv", "id,text\n1,w5\n2,w6 w7\n"), ("jsonl", '{"text": "w5"}\n\n{"text": "w6 w7"}\n')]
)
def test_standard_input_of_any_form(model, right, capsys, monkeypatch, form, content):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    assert pairs(answered(capsys, model, "--input", "-", "--input_format", form)) == right(["w5", "w6 w7"])


def test_pairs_slices_and_so_many_rows(model, right, tmp_path, capsys):
    both = [(f"w{row}", f"w{row + 1}") for row in range(5, 15)]
    lines = "".join(f"{a}\t{b}\n" for a, b in both)
    (tmp_path / "test.tsv").write_text("premise\thypothesis\n" + lines)
    assert pairs(answered(capsys, model, "--input", tmp_path, "--split", "test[2:5]")) == right(both[2:5])
    assert pairs(answered(capsys, model, "--input", tmp_path / "test.tsv", "--max_rows", "3")) == right(both[:3])
    named = ["--text_column", "hypothesis", "premise", "--max_rows", "4"]
    assert pairs(answered(capsys, model, "--input", tmp_path / "test.tsv", *named)) == right([(b, a) for a, b in both[:4]])


@pytest.mark.parametrize("form", ["jsonl", "ndjson", "csv", "tsv", "parquet", "arrow", "jsonl.gz", "csv.gz"])
def test_every_form_is_written(model, right, tmp_path, form, capsys):
    rows = [SEPARATORS, "w5, w6", 'w7 "w8"', "w9"]
    Dataset.from_dict({"id": [1, 2, 3, 4], "text": rows}).to_parquet(tmp_path / "rows.parquet")
    out = tmp_path / f"answers.{form}"
    assert main(["predict", model, "--input", str(tmp_path / "rows.parquet"), "--output", str(out)]) == 0
    assert "4 texts" in capsys.readouterr().out
    opener = gzip.open if form.endswith("gz") else open
    if form in ("parquet", "arrow"):
        found = Dataset.from_parquet(str(out)).to_list() if form == "parquet" else Dataset.from_file(str(out)).to_list()
    else:
        with opener(out, "rt", encoding="utf-8", newline="") as file:
            if "json" in form:
                found = [json.loads(line) for line in file.read().split("\n")[:-1]]
            else:
                found = list(csv.DictReader(file, delimiter="\t" if "tsv" in form else ","))
    assert [str(row["id"]) for row in found] == ["1", "2", "3", "4"]
    assert [row["text"] for row in found] == rows
    assert [(row["label"], int(row["exit_layer"])) for row in found] == right(rows)
    assert all(0 < float(row["score"]) <= 1 for row in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, "rows.parquet"])


def test_a_spreadsheet_computes_nothing(model, tmp_path):
    cells = ["=1+1", "+cmd", "@SUM(A1)", "-2+3", "\tx", "-5", "+4.5", "plain", "a=b"]
    rows = [{"=name": cell, "text": "w5"} for cell in cells]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["predict", model, "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "a.csv")]) == 0
    with open(tmp_path / "a.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["'=name"] for row in found] == ["'=1+1", "'+cmd", "'@SUM(A1)", "'-2+3", "'\tx", "-5", "+4.5", "plain", "a=b"]


def test_rows_are_answered_as_they_come(model, tmp_path, monkeypatch):
    """No more rows are read ahead than a window: memory does not grow with the file."""
    lines = itertools.count()
    read = []

    def endless(place, how):
        for number in lines:
            read.append(number)
            yield {"text": "w5", "id": number}

    monkeypatch.setitem(incoming.READERS, "text", endless)
    answer = predict.run(predict.PredictArguments(model=model, input="-"))
    first = [next(answer.lines)["id"] for _ in range(300)]
    assert first == list(range(300))
    assert len(read) <= 600
    answer.lines.close()


def rows_in(place):
    if place.suffix == ".jsonl":
        return [json.loads(line) for line in place.read_text().splitlines()]
    with open(place, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if place.suffix == ".tsv" else ","))


class StoppedError(Exception):
    """What ends a run in the middle."""


@pytest.mark.parametrize("form", ["jsonl", "csv", "tsv"])
def test_a_stopped_run_goes_on_where_it_was(model, tmp_path, monkeypatch, capsys, form):
    rows = texts(100)
    (tmp_path / "texts.txt").write_text("\n".join(rows) + "\n")
    words = ["predict", model, "--input", str(tmp_path / "texts.txt"), "--output"]
    whole, out = tmp_path / f"whole.{form}", tmp_path / f"answers.{form}"
    assert main([*words, str(whole)]) == 0
    monkeypatch.setattr(outgoing, "WINDOW", 16)
    write, calls = outgoing.as_line if form == "jsonl" else outgoing._cell, itertools.count()

    def fails(value):
        if next(calls) == (40 if form == "jsonl" else 200):
            raise StoppedError
        return write(value)

    monkeypatch.setattr(outgoing, "as_line" if form == "jsonl" else "_cell", fails)
    with pytest.raises(StoppedError):
        main([*words, str(out)])
    assert not out.exists()
    with open(tmp_path / f"answers.{form}.part", "ab") as file:
        file.write(b"half a li")  # as a kill leaves it
    assert main([*words, str(out)]) == 2
    assert "--resume true" in capsys.readouterr().err
    assert main([*words, str(out), "--resume", "true", "--early_exit", "false"]) == 2
    assert "early_exit differs" in capsys.readouterr().err
    assert main([*words, str(out), "--resume", "true"]) == 0
    assert "of them by the run that was stopped" in capsys.readouterr().out
    found, wanted = ([list(row.values()) for row in rows_in(place)] for place in (out, whole))
    assert len(found) == len(wanted) == 100
    for row, same in zip(found, wanted, strict=True):
        assert [row[0], row[1], row[3]] == [same[0], same[1], same[3]]
        assert float(row[2]) == pytest.approx(float(same[2]))  # in other company the last digit may be another
    assert not list(tmp_path.glob("*.part*"))


def test_a_stopped_run_may_be_begun_anew_and_a_shorter_input_is_refused(model, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("w5\nw6\n")
    out = tmp_path / "a.jsonl"
    words = ["predict", model, "--input", str(tmp_path / "texts.txt"), "--output", str(out)]
    run = {"model": model}
    file = outgoing.OutputFile(str(out), run, None)
    file._keep([{"text": "old"}] * 5, 0)
    file.file.close()
    assert main([*words, "--resume", "false"]) == 0
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == ["w5", "w6"]
    with pytest.raises(ee.EarlyExitError, match="2 rows, fewer than the 5"):
        outgoing.skipped(iter([{}, {}]), 5)


def test_a_row_that_cannot_be_answered_is_named_or_kept(model, tmp_path, capsys):
    rows = [{"text": "w5"}, {"text": None}, {"text": 7}, {"text": "w6"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["predict", model, "--input", str(tmp_path / "rows.jsonl")]
    assert main(words) == 2
    assert "Row 1" in capsys.readouterr().err
    out = tmp_path / "a.csv"
    assert main([*words, "--errors", "slot", "--output", str(out)]) == 0
    assert "2 could not be answered" in capsys.readouterr().out
    found = pandas.read_csv(out, keep_default_na=False)
    assert [bool(error) for error in found["error"]] == [False, True, True, False]
    assert found["label"][1] == found["score"][1] == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "w5"}\n{"text"\n', "Line 2 of {place} is not JSON"),
        ('{"text": "w5"}\n[1]\n', "Line 2 of {place} is a JSON list"),
        ('{"body": "w5"}\n', "No text column among body"),
        ('{"text": "w5"}\n{"text": "w5", "z": 1}\n', "'z' that the first one had not"),
    ],
)
def test_rows_that_cannot_be_read_or_written(model, tmp_path, capsys, content, message):
    place = tmp_path / "rows.jsonl"
    place.write_text(content)
    assert main(["predict", model, "--input", str(place), "--output", str(tmp_path / "a.csv")]) == 2
    assert message.format(place=place) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.json"], "expected a name that ends in .jsonl"),
        (["--output", "a.parquet.gz"], "expected a name that ends in .jsonl"),
        (["--output", "nowhere/a.csv"], "a folder that is there"),
        (["--output", "{tmp}/a.parquet", "--resume", "true"], "cannot be gone on with"),
        (["--resume", "true"], "Standard output cannot be gone on with"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--max_rows", "0"], "expected a whole number from 1"),
        (["--device", "gpu"], "cannot be used here"),
        (["--encoding", "latin-99"], "Python does not know"),
        (["--split", "test"], "is a .txt; expected one of"),
        (["--errors", "skip"], "expected 'raise' or 'slot'"),
    ],
)
def test_mistakes(model, tmp_path, capsys, words, message):
    (tmp_path / "texts.txt").write_text("w5\n")
    given = [word.format(tmp=tmp_path) for word in words]
    assert main(["predict", model, "--input", str(tmp_path / "texts.txt"), *given]) == 2
    assert message in capsys.readouterr().err


def test_texts_in_latin_1(model, right, tmp_path, capsys):
    (tmp_path / "texts.txt").write_bytes("w5 é\nw6\n".encode("latin-1"))
    assert main(["predict", model, "--input", str(tmp_path / "texts.txt")]) == 2
    assert "--encoding latin-1" in capsys.readouterr().err
    found = answered(capsys, model, "--input", tmp_path / "texts.txt", "--encoding", "latin-1")
    assert [row["text"] for row in found] == ["w5 é", "w6"]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_no_rows_are_no_answers(model, tmp_path, capsys, name):
    (tmp_path / name).write_text("text\n" if name.endswith("csv") else "")
    assert answered(capsys, model, "--input", tmp_path / name) == []
    assert main(["predict", model, "--input", str(tmp_path / name), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
