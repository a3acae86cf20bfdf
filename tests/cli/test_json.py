"""`--json`: one object on standard output, everything else on standard error, exit status 0 or 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertModel

import hf_earlyexit as ee
from hf_earlyexit.cli.command_result import CommandResult
from hf_earlyexit.cli.main import COMMANDS, main
from tests.conftest import SHAPE
from tests.hub.toy import calibrate, make_model, make_tokenizer, texts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory, tiny_config):
    folder = tmp_path_factory.mktemp("json")
    torch.manual_seed(0)
    BertModel(tiny_config(num_labels=3)).save_pretrained(folder / "bert")
    (folder / "bert" / "config.json").write_text(json.dumps({**SHAPE, "model_type": "bert", "architectures": ["BertModel"]}))
    make_tokenizer().save_pretrained(folder / "bert")
    model = make_model()
    result = calibrate(model, (2.5,))[0]
    model.set_exit_policy(result)
    ee.save(model, folder / "model", tokenizer=make_tokenizer(), calibration=result, card=False)
    (folder / "data").mkdir()
    (folder / "texts.txt").write_text("\n".join(texts(12)) + "\n")
    for split, count in (("train", 60), ("test", 60)):
        rows = [f"{text},{number % 3}" for number, text in enumerate(texts(count))]
        (folder / "data" / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return folder


TRAIN = ["{bert}", "--dataset", "{data}", "--output_dir", "{out}", "--max_steps", "2", "--held_back", "0.5", "--use_cpu"]
TRAIN += ["--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]
CASES = {
    "train": ([*TRAIN, "--disable_tqdm", "true"], {"model", "held_back", "steps", "metrics"}),
    "consistentee": (
        [*TRAIN, "--gate_epochs", "1", "--chosen_epochs", "1", "--rounds", "1", "--exits_trained", "true"],
        {"model", "held_back", "phases"},
    ),
    "evaluate": (["{model}", "--dataset", "{data}"], {"policy", "quality", "mean_layers", "exit_shares"}),
    "predict": (["{model}", "--input", "{texts}"], {"rows", "mean_layers", "num_layers", "answers"}),
    "explain": (["{model}", "--text", "w5 w6"], {"exits", "exit_layer"}),
    "report": (
        ["{model}", "--dataset", "{data}", "--split", "test", "--output", "{out}.html"],
        {"output", "rows", "rows_that_chose", "best", "policies", "left_out"},
    ),
    "bench": (
        ["{model}", "--input", "{texts}", "--repeats", "1", "--latency_rows", "2", "--batch_size", "4", "--forms", "fp32"],
        {"rows", "exits", "throughput", "latency", "advice", "environment"},
    ),
    "export": (["onnx", "{model}", "{out}", "--forms", "layers"], {"output", "forms", "int8"}),
    "env": ([], {"python", "torch", "devices"}),
    "calibrate": (
        ["{model}", "--dataset", "{data}", "--split", "test", "--target", "layer-budget:3", "--keep_weak_exits"],
        {"model", "operating_point", "policy", "target", "curve", "quality"},
    ),
}


def test_every_command_has_a_case():
    elsewhere = {"push", "caption", "generate", "recalibrate", "monitor"}  # tests/hub, test_{caption,generate,promises}.py
    elsewhere |= {"serve"}  # tests/server: it answers until it is stopped
    assert set(CASES) == set(COMMANDS.names()) - elsewhere


@pytest.mark.parametrize("command", CASES)
def test_standard_output_is_one_json_object(command, places, tmp_path, capfd):
    words, names = CASES[command]
    known = {name: places / name for name in ("bert", "model", "data")} | {
        "texts": places / "texts.txt", "out": tmp_path / "out"
    }  # fmt: skip
    assert main([command, *(word.format(**known) for word in words), "--json"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 1
    assert names <= json.loads(lines[0], parse_constant=pytest.fail).keys()


def test_values_are_those_of_the_words(places, tmp_path, capsys):
    def run(*words):
        assert main(["predict", str(places / "model"), "--input", str(places / "texts.txt"), *words]) == 0
        return capsys.readouterr().out

    lines = [json.loads(line) for line in run().splitlines()]
    found = json.loads(run("--json"))
    assert found["answers"] == lines
    assert found["mean_layers"] == pytest.approx(sum(one["exit_layer"] for one in lines) / 12)
    saved = json.loads(run("--json", "true", "--output", str(tmp_path / "answers.jsonl")))
    assert saved.pop("output") == str(tmp_path / "answers.jsonl")
    assert saved == {name: found[name] for name in ("rows", "form", "mean_layers", "num_layers")}
    assert saved["form"] == "fp32"
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == lines


def test_a_recipe_may_ask_for_it_and_a_flag_may_forbid_it(places, tmp_path, capsys):
    (tmp_path / "env.yaml").write_text("json: true\n")
    assert main(["env", "--config", str(tmp_path / "env.yaml")]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["env", "--config", str(tmp_path / "env.yaml"), "--json", "false"]) == 0
    assert capsys.readouterr().out.startswith("python  ")


def test_a_mistake_prints_nothing_on_standard_output(places, capsys):
    assert main(["evaluate", str(places / "model"), "--dataset", "nowhere", "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "nowhere" in told.err


@pytest.mark.parametrize(("words", "status"), [(["env"], 0), (["env", "--jsn"], 2)])
def test_exit_status_of_the_program(words, status):
    done = subprocess.run([sys.executable, "-m", "hf_earlyexit.cli.main", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_numbers_that_are_not_finite_are_null():
    result = CommandResult({"a": float("nan"), "b": [1.5, float("inf")], 3: {"c": None}}, "words")
    assert json.loads(result.printed(as_json=True)) == {"a": None, "b": [1.5, None], "3": {"c": None}}
    assert result.printed(as_json=False) == "words"
