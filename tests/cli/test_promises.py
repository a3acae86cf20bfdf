"""The commands that recalibrate and that read a monitor."""

import json

import pytest

import hf_earlyexit as ee
from hf_earlyexit.calibration import replay
from hf_earlyexit.cli.main import main
from hf_earlyexit.serving.monitor import Monitor


@pytest.fixture
def folder(tmp_path, tiny_model, tokenizer, random_texts):
    """A calibrated model, and rows of today with the full model's answers as labels."""
    return calibrated_folder(tmp_path, tiny_model().eval(), tokenizer, random_texts)


def calibrated_folder(tmp_path, model, tokenizer, random_texts):
    texts = random_texts(120)
    trace = ee.collect_trace(model, texts, tokenizer=tokenizer, labelled=False, progress=False)
    model.set_exit_policy(ee.calibrate(trace, "confidence", ee.MaxDrop(0.2), keep_weak_exits=True))
    ee.save(model, tmp_path / "model", tokenizer=tokenizer)
    fresh = random_texts(240)[120:]
    labels = ee.predict(model, fresh, tokenizer=tokenizer, early_exit=False).logits.argmax(-1).tolist()
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(fresh, labels, strict=True)]
    (tmp_path / "fresh.jsonl").write_text("\n".join(lines))
    return tmp_path


def run(capsys, *words):
    status = main([*map(str, words), "--json", "true"])
    printed = capsys.readouterr().out
    return status, None if status == 2 else json.loads(printed)


@pytest.mark.parametrize("unlabelled", ["false", "true"])
def test_new_thresholds_stand_beside_the_old_ones(folder, capsys, tokenizer, unlabelled):
    before = ee.from_pretrained(folder / "model")
    words = ["recalibrate", folder / "model", "--dataset", folder / "fresh.jsonl", "--operating_point", "june"]
    status, found = run(capsys, *words, "--unlabelled", unlabelled)
    assert status == 0
    after = ee.from_pretrained(folder / "model")
    assert after.exit_policy == before.exit_policy
    assert after.operating_points == ("exact", "june")
    rows = [json.loads(line) for line in (folder / "fresh.jsonl").read_text().splitlines()]
    texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    trace = ee.collect_trace(after, texts, tokenizer=tokenizer, labels=labels, progress=False)
    for name, policy in (("old", before.exit_policy), ("new", after.policy_at("june"))):
        expected = replay(policy, trace, found["result"]["metric"])
        assert found[name]["quality"] == pytest.approx(expected.quality)
        assert found[name]["mean_layers"] == pytest.approx(expected.mean_layers)
        assert found[name]["thresholds"] == list(policy.thresholds)
    assert found["result"]["target"] == before.config.exit_certificate["target"]
    assert found["new"]["full_quality"] - found["new"]["quality"] <= 0.2 + 1e-9

    status, _ = run(capsys, *words)
    assert status == 2  # nothing is overwritten
    assert ee.from_pretrained(folder / "model").policy_at("june") == after.policy_at("june")


@pytest.mark.parametrize(
    ("command", "drop", "meant"),
    [("calibrate", "1", "0.01"), ("calibrate", "1.5", "0.015"), ("recalibrate", "1", "0.01")],
)
def test_a_drop_that_gives_the_model_away_is_refused_before_anything_is_written(
    folder, capsys, monkeypatch, command, drop, meant
):
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = [
        command,
        *(["--operating_point", "june"] if command == "recalibrate" else []),
        "--model",
        "model",
        "--dataset",
        "fresh.jsonl",
        "--target",
    ]
    assert main([*words, f"max-drop:{drop}"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"hf-earlyexit {command}: A drop of {drop} permits to lose all of the full model's quality")
    assert message.endswith(f"Nothing was written. If you meant points, write --target max-drop:{meant}.")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    if command == "calibrate":
        assert main([*words, f"max-drop:{meant}"]) == 0


def test_a_monitor_is_told_with_a_status(tmp_path, capsys):
    quiet, loud = (Monitor((1, 2), shadow=1.0, reference=(0.5, 0.5)) for _ in range(2))
    quiet.record([1, 2] * 200, [True] * 400)
    loud.record([1, 2] * 200, [False] * 400)
    for name, monitor, expected in (("quiet", quiet, 0), ("loud", loud, 1)):
        monitor.save(tmp_path / f"{name}.json")
        status, found = run(capsys, "monitor", tmp_path / f"{name}.json")
        assert status == expected
        assert found["state"]["num_rows"] == 400
        assert found["disagreement"] == list(monitor.bounds())
        assert main(["monitor", str(tmp_path / f"{name}.json")]) == expected
        assert ("ALARM" in capsys.readouterr().out) is (name == "loud")
    assert main(["monitor", str(tmp_path / "none.json")]) == 2
    assert "no saved monitor" in capsys.readouterr().err


@pytest.fixture
def listed(tmp_path, tiny_model, tokenizer, random_texts):
    """A calibrated model of two labels, whose rows of today have a region and a query each."""
    folder = calibrated_folder(tmp_path, tiny_model(num_labels=2).eval(), tokenizer, random_texts)
    rows = [json.loads(line) for line in (folder / "fresh.jsonl").read_text().splitlines()]
    more = [{**row, "region": ["north", "south"][place % 2], "query": f"q{place // 3}"} for place, row in enumerate(rows)]
    (folder / "listed.jsonl").write_text("\n".join(map(json.dumps, more)))
    return folder


@pytest.mark.parametrize("command", ["calibrate", "recalibrate"])
def test_promises_about_slices_and_lists(listed, capsys, tokenizer, command):
    """The same as by `calibrate`, from columns of the rows."""
    words = [command, "--model", listed / "model", "--dataset", listed / "listed.jsonl", "--operating_point"]
    rows = [json.loads(line) for line in (listed / "listed.jsonl").read_text().splitlines()]
    columns = {name: [row[name] for row in rows] for name in ("text", "label", "region", "query")}
    model = ee.from_pretrained(listed / "model")
    options = {"tokenizer": tokenizer, "labels": columns["label"], "progress": False, "split": "validation"}
    trace = ee.collect_trace(model, columns["text"], **options)
    target = "certified:0.6@0.8:by=group"
    status, found = run(capsys, *words, "slices", "--target", target, "--group_column", "region")
    assert status == 0
    promise = (found.get("result") or found)["promise"]
    expected = ee.calibrate(trace, "confidence", target, groups=columns["region"]).promise
    assert [group["name"] for group in promise["groups"]] == ["group north", "group south"]
    assert promise == {**expected.to_dict(), "date": promise["date"]}

    target = "certified:0.6@0.8"
    status, found = run(capsys, *words, "lists", "--target", target, "--list_column", "query", "--metric", "ndcg:2")
    assert status == 0
    promise = (found.get("result") or found)["promise"]
    expected = ee.calibrate(trace, "confidence", target, lists=columns["query"], metric="ndcg:2").promise
    assert (promise["unit"], promise["num_rows"], promise["measure"]) == ("lists", 32, "ndcg:2 of a list")
    assert promise == {**expected.to_dict(), "date": promise["date"]}


@pytest.mark.parametrize("command", ["calibrate", "recalibrate"])
def test_lists_and_slices_may_be_what_the_model_reads(listed, capsys, command):
    """Rows of a question and a passage, in lists by the question; slices by a column with a usual name of texts."""
    rows = [json.loads(line) for line in (listed / "listed.jsonl").read_text().splitlines()]
    pairs = [{"query": row["query"], "passage": row["text"], "text": row["region"], "label": row["label"]} for row in rows]
    (listed / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    words = [command, "--model", listed / "model", "--dataset", listed / "pairs.jsonl", "--text_column", "query", "passage"]
    words += ["--target", "certified:0.6@0.8", "--operating_point"]
    status, found = run(capsys, *words, "lists", "--list_column", "query", "--metric", "ndcg:2")
    assert status == 0
    assert (found.get("result") or found)["promise"]["num_rows"] == 32
    words[words.index("certified:0.6@0.8")] = "certified:0.6@0.8:by=group"
    status, found = run(capsys, *words, "slices", "--group_column", "text")
    assert status == 0
    names = [group["name"] for group in (found.get("result") or found)["promise"]["groups"]]
    assert names == ["group north", "group south"]


def test_columns_of_slices_and_lists_that_cannot_be(listed, capsys, tokenizer):
    trace = ee.collect_trace(ee.from_pretrained(listed / "model"), ["a"], labels=[0], tokenizer=tokenizer, progress=False)
    trace.save(listed / "model" / "held-back.safetensors")
    words = ["calibrate", "--model", str(listed / "model"), "--target", "certified:0.6@0.8:by=group"]
    file = listed / "listed.jsonl"
    rows = [*words, "--dataset", str(file)]
    file.write_text(file.read_text().replace('"south"', "null", 1))
    for given, message in (
        ([*rows, "--group_column", "place"], "No column 'place' among text, label, region, query; name the column of group"),
        ([*rows, "--group_column", "region"], "Row 1 has nothing in its column 'region'; expected its group."),
        ([*words, "--list_column", "query"], "--list_column is of rows of --dataset; held-back.safetensors has no columns"),
    ):
        assert main(given) == 2
        assert message in capsys.readouterr().err


def test_calibrate_takes_a_metric_and_rows_without_labels(folder, capsys):
    words = ["calibrate", folder / "model", "--dataset", folder / "fresh.jsonl"]
    _, found = run(capsys, *words, "--metric", "balanced-accuracy", "--target", "max-drop:0.3")
    assert found["metric"] == "balanced-accuracy"
    _, found = run(capsys, *words, "--unlabelled", "true", "--target", "max-drop:0.3")
    assert any("no labels" in note for note in found["notes"])
    _, judged = run(capsys, "evaluate", folder / "model", "--dataset", folder / "fresh.jsonl")
    assert judged["quality"] == pytest.approx(found["quality"])
    assert judged["expected"]["num_folds"] == found["expected"]["num_folds"]
    _, judged = run(capsys, "evaluate", folder / "model", "--dataset", folder / "fresh.jsonl", "--metric", "f1-macro")
    assert judged["measure"] == "macro F1"
