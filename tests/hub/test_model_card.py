"""The card re-parses, tells the data's numbers, and nothing that is not its business."""

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import EvalResultEntry, ModelCard
from huggingface_hub._eval_results import parse_eval_result_entries
from sklearn.metrics import f1_score

import hf_earlyexit as ee
from hf_earlyexit.errors import UnknownNameError, UsageError
from hf_earlyexit.hub import model_card
from hf_earlyexit.hub.model_card import model_card_files
from hf_earlyexit.losses import OBJECTIVES
from hf_earlyexit.policies import POLICIES, ConfidencePolicy, GatePolicy, SaturationPolicy, register_policy
from hf_earlyexit.problem_types import MULTI_LABEL, REGRESSION
from hf_earlyexit.timing import Timing
from tests.hub.toy import make_all, texts
from tests.samples import learned_trace

HOSTILE = ["a|b", "---\n---\n# x", "<script>alert(1)</script>\n\n| c | d |\n|---|---|"]
SECRET = "hf_" + "Z" * 34


@pytest.fixture(scope="module")
def calibration():
    trace = learned_trace(rows=600, split="validation")
    return {
        "fast": ee.calibrate(trace, "beem-a", ee.SpeedUp(1.6)),
        "balanced": ee.calibrate(trace, "patience", ee.MaxDrop(0.01)),
    }


@pytest.fixture(scope="module")
def evaluations(calibration):
    test = learned_trace(rows=300, seed=1)
    return {name: ee.replay(result.policy, test) for name, result in calibration.items()}


@pytest.fixture
def model(tiny_model, calibration):
    model = tiny_model()
    model.set_exit_policy(calibration["balanced"].policy)
    return model


def card_of(files) -> ModelCard:
    return ModelCard(files["README.md"].decode())


def table(text: str, first: str) -> list[list[str]]:
    """Cells of the body of the table whose first heading is `first`."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert len({len(row) for row in rows}) == 1, "every row has as many cells as the heading"
    return rows[2:]


def test_metadata_is_what_the_hub_wants(model, calibration):
    files = model_card_files(
        model, calibration, base_model="google-bert/bert-base-uncased", datasets=["stanfordnlp/sst2"], license="mit"
    )
    data = card_of(files).data
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-classification"
    assert data.tags == ["hf_earlyexit", "early-exit", "beem-a", "patience"]
    assert (data.base_model, data.base_model_relation) == ("google-bert/bert-base-uncased", "finetune")
    assert (data.datasets, data.metrics, data.license) == (["stanfordnlp/sst2"], ["accuracy"], "mit")
    assert set(files) == {"README.md", "plots/pareto.svg", "plots/exits.svg"}


def test_numbers_are_those_of_the_data(model, calibration, evaluations):
    timings = {"fast": Timing(1.0, 1.523, 1.48, 1.61)}
    text = model_card_files(model, calibration, evaluations=evaluations, timings=timings)["README.md"].decode()
    for row, (name, done) in zip(table(text, "operating point"), evaluations.items(), strict=True):
        speed = "1.52x (1.48 to 1.61)" if name == "fast" else "not measured"
        assert row == [
            name,
            calibration[name].policy.name,
            "300, chose nothing",
            f"{done.quality:.4f}",
            f"{done.full_quality:.4f}",
            f"{done.quality - done.full_quality:+.4f} ({done.standard_error:.4f})",
            f"{done.mean_layers:.2f}",
            f"{done.layer_speed_up:.2f}x",
            speed,
        ]
    chosen = text[text.index("## How the thresholds") :]
    fast = calibration["fast"]
    row = table(chosen, "operating point")[0]
    assert row == ["fast", fast.target, str(fast.num_rows), "validation", str(fast.num_learning_rows), "0", "unknown"]
    for index, row in enumerate(table(chosen, "layer")[:-1]):
        assert row[1:] == [f"{result.policy.thresholds[index]:.4f}" for result in calibration.values()]
    assert "thresholds of **balanced**" in text


def test_without_evaluation_the_rows_that_chose_speak_and_say_so(model, calibration):
    text = model_card_files(model, calibration)["README.md"].decode()
    row = table(text, "operating point")[1]
    assert row[2:4] == ["600, chose the thresholds", f"{calibration['balanced'].quality:.4f}"]
    assert "Time was not measured" in text
    assert "measured speed-up" not in text


def test_figures_for_the_card_are_those_of_predict_and_the_clock(tmp_path):
    model, tokenizer, results = make_all()
    rows = {"text": texts(60), "label": [number % 3 for number in range(60)]}
    figures = ee.hub.card_figures(model, results, Dataset.from_dict(rows), tokenizer=tokenizer, repeats=2, progress=False)
    for name in results:
        layers = ee.predict(model, rows["text"], tokenizer=tokenizer, operating_point=name).exit_layer
        assert figures["evaluations"][name].exit_layer.tolist() == layers.tolist()
        assert figures["timings"][name].low <= figures["timings"][name].speed_up <= figures["timings"][name].high
    untimed = ee.hub.card_figures(model, results, rows["text"], tokenizer=tokenizer, labels=rows["label"], repeats=0)
    assert set(untimed) == {"evaluations"}
    ee.save(model, tmp_path, calibration=results, card={"license": "mit", **figures})
    text = (tmp_path / "README.md").read_text()
    assert f"60 texts, cpu, {torch.get_num_threads()} threads, float32" in text
    assert f"{figures['timings']['fast'].speed_up:.2f}x" in text
    with pytest.raises(UsageError, match="no calibration"):
        ee.hub.card_figures(model, None, rows["text"])
    with pytest.raises(UsageError, match="repeats is -1; expected a whole number from 0"):
        ee.hub.card_figures(model, results, rows["text"], repeats=-1)


def test_where_time_was_measured_names_no_machine(model, calibration):
    timings = {"fast": Timing(1.0, 1.5, 1.4, 1.6)}
    text = model_card_files(model, calibration, timings=timings, timed_on=f"on /home/alice/x {SECRET} <b>")[
        "README.md"
    ].decode()
    assert "alice" not in text
    assert SECRET not in text
    assert "<b>" not in text


def test_results_are_written_for_named_data_only(model, calibration, evaluations):
    def results(**given):
        files = model_card_files(model, calibration, evaluations=evaluations, **given)
        return {name: data for name, data in files.items() if name.startswith(".eval_results/")}

    assert not results()
    assert not results(datasets=["/home/alice/data"])
    assert not results(datasets=["a/b", "c/d"])
    assert results(datasets=["a/b", "c/d"], evaluated_on="c/d").keys() == results(datasets=["c/d"]).keys()
    found = results(datasets=["stanfordnlp/sst2"])
    assert set(found) == {".eval_results/fast.yaml", ".eval_results/balanced.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(found[".eval_results/fast.yaml"]))
    assert isinstance(entry, EvalResultEntry)
    assert (entry.dataset_id, entry.value) == ("stanfordnlp/sst2", evaluations["fast"].quality)
    assert f"mean exit {evaluations['fast'].mean_layers:.2f}/4" in entry.notes


def test_hostile_labels_and_names_stay_text(tiny_model, calibration, evaluations):
    model = tiny_model(id2label=dict(enumerate(HOSTILE)), label2id={name: index for index, name in enumerate(HOSTILE)})
    point = '../x" | <b>\n---'
    calibration, evaluations = {point: calibration["fast"]}, {point: evaluations["fast"]}
    files = model_card_files(
        model, calibration, evaluations=evaluations, license="x\n---\ny", language="en\n---", datasets=["a/b"]
    )
    card = card_of(files)
    assert card.data.library_name == "transformers"
    assert card.data.license == "x\n---\ny"
    assert card.text.strip().startswith("# Text classifier")
    assert "<script" not in card.text
    assert not re.search(r"<b>|^---$", card.text, re.MULTILINE)
    assert len(table(card.text, "operating point")) == 1
    assert set(files) >= {".eval_results/x-b.yaml"}
    assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)


def test_nothing_private_gets_out(model, calibration, tmp_path):
    trace = learned_trace(rows=300, split=f"{tmp_path}/held-back.csv", meta={"dtype": "/home/alice/x"})
    private = {"fast": ee.calibrate(trace, "confidence", ee.MaxDrop(0.01))}
    files = model_card_files(
        model, private, base_model=str(tmp_path), datasets=[str(tmp_path), SECRET], repo_id=f"/home/alice/{SECRET}"
    )
    everything = b"".join(files.values()).decode()
    for secret in (str(tmp_path), SECRET, "alice", str(Path.home()) + "/", "/home/"):
        assert secret not in everything
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", everything)
    assert card_of(files).data.base_model is None


def test_only_used_methods_are_cited(model, calibration):
    text = model_card_files(model, calibration)["README.md"].decode()
    assert "2502.00745" in text
    assert "2006.04152" in text
    assert "DeeBERT" not in text
    assert text.count("@inproceedings") == 2


def test_policies_and_objectives_name_their_papers(calibration, model):
    uncited = {"confidence", "margin", "static"}  # common practice without a single source
    for registry in (POLICIES, OBJECTIVES):
        own = [name for name in registry.names() if registry.get(name).__module__.startswith("hf_earlyexit.")]
        for name in own:
            entries = registry.get(name).citation
            assert bool(entries) == (name not in uncited), name
            assert all(re.fullmatch(r"@inproceedings\{\w+,\n.*\n\}", entry, re.DOTALL) for entry in entries)
    assert "ConsistentEE" in GatePolicy.citation[0]
    assert "ConsistentEE" in POLICIES.get("reward").citation[0]
    assert "Multiple Exiting" in SaturationPolicy.citation[0]
    for name in POLICIES.names():  # a paper is cited where its rule is used, whichever it is
        text = "\n".join(model_card._citations([name], None))
        assert text == "\n".join(POLICIES.get(name).citation)


def test_the_card_of_gates_cites_their_paper(tiny_model):
    model = tiny_model(exit_gate="mlp")
    model.set_exit_policy(GatePolicy.half(len(model.exit_layers)))
    assert "ConsistentEE" in model_card_files(model, {})["README.md"].decode()


def test_the_objective_is_told_and_cited(model, calibration):
    only = {"balanced": calibration["balanced"]}
    plain = model_card_files(model, only)["README.md"].decode()
    told = model_card_files(model, only, objective="two-stage")["README.md"].decode()
    assert "DeeBERT" not in plain
    assert "trained with the objective two-stage" in told
    assert "DeeBERT" in told
    with pytest.raises(UnknownNameError, match="two-stage"):
        model_card_files(model, only, objective="two-stages")


def test_a_rule_of_a_third_party_is_cited_by_what_it_says_of_itself(model, monkeypatch):
    monkeypatch.setattr(POLICIES, "_items", dict(POLICIES._items))

    @register_policy("theirs")
    class Theirs(ConfidencePolicy):
        citation = ("@misc{theirs,\n  title = {Theirs}\n}",)

    model.set_exit_policy(Theirs(thresholds=(0.9,) * (len(model.exit_layers) - 1)))
    assert "@misc{theirs," in model_card_files(model, {})["README.md"].decode()


def test_notes_of_the_calibration_are_told(model, calibration):
    noted = dataclasses.replace(calibration["fast"], notes=("no row leaves early", f"a `b` of {SECRET}"))
    text = model_card_files(model, {"fast": noted})["README.md"].decode()
    assert "Note on fast: no row leaves early." in text
    assert "Note on fast: a &#96;b&#96; of &#91;left out&#93;." in text


def test_a_model_without_calibration_says_so(tiny_model):
    files = model_card_files(tiny_model(), {}, repo_id="org/name")
    assert set(files) == {"README.md"}
    text = files["README.md"].decode()
    assert "made without a calibration" in text
    assert 'model="org/name"' in text
    assert card_of(files).data.tags == ["hf_earlyexit", "early-exit"]


@pytest.mark.parametrize(("problem", "metrics"), [(MULTI_LABEL, None), (REGRESSION, ["mse"])])
def test_other_problems_claim_no_accuracy(problem, metrics, tiny_model):
    trace = learned_trace(rows=300, classes=3, problem_type=problem)
    options = {"tolerance": 0.5} if problem == REGRESSION else {}
    result = ee.calibrate(trace, "patience", ee.MaxDrop(0.5), options=options)
    model = tiny_model(problem_type=problem)
    files = model_card_files(model, {"one": result}, datasets=["a/b"], evaluations={"one": ee.replay(result.policy, trace)})
    assert card_of(files).data.metrics == metrics
    assert not [name for name in files if name.startswith(".eval")]
    assert "accuracy |" not in files["README.md"].decode()


def test_figures_of_a_point_that_is_not_there_are_refused(model, calibration, evaluations):
    with pytest.raises(UsageError, match=r"'other'.*fast, balanced"):
        model_card_files(model, calibration, evaluations={"other": evaluations["fast"]})
    with pytest.raises(UsageError, match="Two operating points"):
        model_card_files(
            model,
            {"a b": calibration["fast"], "a-b": calibration["fast"]},
            evaluations={"a b": evaluations["fast"], "a-b": evaluations["fast"]},
            datasets=["a/b"],
        )


def test_code_in_the_card_compiles(model, calibration):
    text = model_card_files(model, calibration, repo_id="org/name")["README.md"].decode()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_the_card_does_not_need_matplotlib(model, calibration, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.hub.model_card.find_spec", lambda name: None)
    files = model_card_files(model, calibration)
    assert set(files) == {"README.md"}
    assert "plots/" not in files["README.md"].decode()


def test_the_clients_own_validation_accepts_it(model, calibration, tmp_path):
    """`ModelCard.validate` asks the Hub; a stand-in on the loopback checks that what arrives is the metadata as written."""
    seen = []

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            fine = "library_name" in yaml.safe_load(seen[-1]["content"].split("---\n")[1])
            self.send_response(200 if fine else 400)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        (tmp_path / "README.md").write_bytes(model_card_files(model, calibration)["README.md"])
        code = f"from huggingface_hub import ModelCard; ModelCard.load({str(tmp_path / 'README.md')!r}).validate()"
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=place, capture_output=True, text=True, timeout=60)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert seen[0]["repoType"] == "model"


def test_f1_stands_on_the_card_where_classes_are_uneven(model, calibration, evaluations):
    rows = table(
        model_card_files(model, calibration, evaluations=evaluations, f1s={"fast": (0.81, 0.92)})["README.md"].decode(),
        "operating point",
    )
    assert [row[6:8] for row in rows] == [["0.8100", "0.9200"], ["not measured", "not measured"]]
    assert "F1" not in model_card_files(model, calibration, evaluations=evaluations)["README.md"].decode()
    with pytest.raises(UsageError, match="f1s has 'slow'"):
        model_card_files(model, calibration, f1s={"slow": (0.5, 0.5)})


def test_every_class_stands_on_the_card(model, calibration, evaluations):
    text = model_card_files(model, calibration, evaluations=evaluations)["README.md"].decode()
    part = text[text.index("### By class") :]
    names = [model.config.id2label[label] for label in range(3)]
    assert [row[:5] for row in table(part, "operating point")] == [
        [point, name, str(report.num_rows), f"{report.recall:.4f}", f"{report.full_recall:.4f}"]
        for point, done in evaluations.items()
        for name, report in zip(names, done.classes, strict=True)
    ]
    uneven = model_card_files(model, calibration, evaluations=evaluations, f1s={"fast": (0.8, 0.9)})["README.md"].decode()
    first = table(uneven[uneven.index("### By class") :], "operating point")[0]
    assert first[5:] == [f"{evaluations['fast'].classes[0].f1:.4f}", f"{evaluations['fast'].classes[0].full_f1:.4f}"]


@pytest.mark.parametrize("uneven", [False, True])
def test_card_figures_measure_f1_where_classes_are_uneven(uneven):
    model, tokenizer, results = make_all()
    labels = [index % 3 if index < 15 or not uneven else 0 for index in range(60)]
    rows = Dataset.from_dict({"text": texts(60), "label": labels})
    judged = ee.hub.card_figures(model, results, rows, tokenizer=tokenizer, repeats=0, progress=False)
    assert ("f1s" in judged) is uneven
    if uneven:
        early = ee.predict(model, rows, tokenizer=tokenizer, operating_point="fast").logits.argmax(-1)
        full = ee.predict(model, rows, tokenizer=tokenizer, early_exit=False).logits.argmax(-1)
        expected = [f1_score(labels, answers, average="macro") for answers in (early, full)]
        assert judged["f1s"]["fast"] == pytest.approx(expected)


def test_the_base_model_is_where_the_model_was_loaded_from(model, calibration, tmp_path):
    def base(name, **fields):
        model.config.name_or_path = name
        return card_of(model_card_files(model, calibration, **fields)).data.base_model

    assert base("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    assert base("google-bert/bert-base-uncased", base_model="org/other") == "org/other"
    assert base(str(tmp_path)) is None
    assert base("") is None


def test_the_standard_error_of_rows_that_chose_nothing_is_told(model, calibration, evaluations):
    text = model_card_files(model, calibration, evaluations=evaluations)["README.md"].decode()
    promise = text[text.index("What the thresholds do not promise") :]
    for name, done in evaluations.items():
        assert f"{done.standard_error:.4f} for {name}" in promise


def test_the_card_words_what_is_expected_and_what_is_promised(model):
    trace = learned_trace(rows=3000, split="validation")
    certified = ee.calibrate(trace, "confidence", ee.Certified(0.05, 0.9, risk="harm"))
    chosen = ee.calibrate(trace, "confidence", ee.MaxDrop(0.01))
    model.set_exit_policy(certified.policy)
    text = card_of(model_card_files(model, {"sure": certified, "quick": chosen})).text
    words = " ".join(text.split())
    assert (
        "sure is certified. With 90 % confidence over the draw of the 2400 certifying rows, the early answer is wrong"
        in words
    )
    assert "600 other rows made the" in words
    assert f"{certified.promise.mean_loss:.4f} (p = {certified.promise.p_value:.2g}" in words
    assert f"quick, expected on rows not seen: {chosen.expected.difference:+.4f}" in words
    assert "quick is certified" not in words
