"""train, calibrate, predict: from a folder of texts to answers that leave early."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.hub.save import load_calibrations
from hf_earlyexit.training.data import with_ids
from tests.conftest import SHAPE


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, tokenizer, random_texts):
    """A plain checkpoint, texts whose first word decides their label, and a recipe."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    BertModel(tiny_config(num_labels=2)).save_pretrained(folder / "bert")
    (folder / "bert" / "config.json").write_text(
        json.dumps({**SHAPE, "num_labels": 2, "model_type": "bert", "architectures": ["BertModel"]})
    )
    tokenizer.save_pretrained(folder / "bert")
    data = folder / "data"
    data.mkdir()
    for split, count, seed in (("train", 400, 0), ("test", 40, 1)):
        texts = random_texts(count, seed=seed, longest=3)
        lines = ["text,label", *(f"{text},{int(int(text.split()[0][1:]) > 50)}" for text in texts)]
        (data / f"{split}.csv").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(
        f"model: {folder / 'bert'}\ndataset: {data}\noutput_dir: {folder / 'out'}\nheld_back: 0.25\nnum_train_epochs: 6\n"
        "learning_rate: 3.0e-3\nper_device_train_batch_size: 20\nsave_strategy: 'no'\nreport_to: []\nuse_cpu: true\n"
        "exit_layers: [1, 2, 3, 4]\ndisable_tqdm: true\n"
    )
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    assert main(["train", "--config", str(folder / "recipe.yaml")]) == 0
    return folder / "out"


def test_training_leaves_a_model_and_a_trace_of_rows_it_never_saw(trained):
    trace = ee.ExitTrace.load(trained / "held-back.safetensors")
    assert trace.num_rows == 100
    assert trace.split == "held-back"
    assert float(trace.quality[:, -1].mean()) > 0.8


def test_calibration_puts_the_policy_into_the_folder(trained, capsys):
    words = ["calibrate", "--model", str(trained), "--policy", "confidence", "--target", "max-drop:0.02"]
    assert main(words) == 0
    assert "layer speed-up" in capsys.readouterr().out
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(trained)
    result = ee.calibration.CalibrationResult.load(trained / "calibration.json")
    assert model.exit_policy == result.policy
    assert result.layer_speed_up > 1


def test_calibrations_by_name_are_kept_beside_the_default(trained, tmp_path):
    out = shutil.copytree(trained, tmp_path / "out")
    for file in ("config.json", "calibration.json"):
        (out / file).unlink(missing_ok=True)
    config = json.loads((trained / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"exit_policy": None, "exit_certificate": None}))

    def calibrate(policy, *point):
        assert main(["calibrate", str(out), "--policy", policy, *point]) == 0
        return ee.EarlyExitBertForSequenceClassification.from_pretrained(out), load_calibrations(out)

    model, results = calibrate("static", "--operating_point", "fast")
    assert model.exit_policy == model.policy_at("fast") == results["fast"].policy
    model, results = calibrate("patience", "--operating_point", "careful")
    assert set(model.operating_points) == {"exact", "fast", "careful"}
    assert model.exit_policy == results["fast"].policy != results["careful"].policy
    model, results = calibrate("confidence")
    assert model.exit_policy == results["default"].policy
    assert {name: model.policy_at(name) for name in ("fast", "careful")} == {
        name: results[name].policy for name in ("fast", "careful")
    }
    assert set(model.config.exit_point_certificates) == {"fast", "careful"}
    ee.save(model, tmp_path / "saved", calibration=results, card=False)
    (out / "calibration.json").write_text("{")
    assert list(calibrate("margin", "--operating_point", "fast")[1]) == ["fast"]


def test_prediction_writes_a_line_for_every_text_in_order(trained, folder, tmp_path, tokenizer):
    main(["calibrate", "--model", str(trained), "--policy", "confidence", "--target", "max-drop:0.02"])
    texts = ["w9 w80", "w90", "w10 w11 w12"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    out = tmp_path / "answers.jsonl"
    assert main(["predict", "--model", str(trained), "--input", str(tmp_path / "texts.txt"), "--output", str(out)]) == 0
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [answer["text"] for answer in answers] == texts
    assert [answer["label"] for answer in answers] == ["LABEL_0", "LABEL_1", "LABEL_0"]
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(trained)
    layers = ee.predict(model, texts, tokenizer=tokenizer).exit_layer.tolist()
    assert [answer["exit_layer"] for answer in answers] == layers


def test_a_data_set_can_be_classified(trained, folder, capsys):
    assert main(["predict", "--model", str(trained), "--input", str(folder / "data"), "--split", "test"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 40


def test_flags_win_over_the_recipe(folder, tmp_path):
    words = ["train", "--config", str(folder / "recipe.yaml"), "--output_dir", str(tmp_path), "--max_steps", "1"]
    assert main([*words, "--exit_layers", "2", "4"]) == 0
    assert ee.EarlyExitBertForSequenceClassification.from_pretrained(tmp_path).exit_layers == (2, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "Did you mean 'train'"),
        (["calibrate", "--model", "{out}", "--policy", "beam"], "Did you mean 'beem"),
        (["calibrate", "--model", "{out}", "--target", "max-dorp:1"], "Did you mean 'max-drop'"),
        (["calibrate", "--model", "{out}", "--options", "{{"], "expected JSON"),
        (["calibrate", "--model", "nowhere"], "no folder"),
        (["calibrate", "--model", "{out}", "--dataset", "{data}", "--split", "dev"], "it has test, train"),
        (["predict", "--model", "{out}", "--input", "{bert}"], "holds no"),
    ],
)
def test_mistakes_are_told_in_one_line(words, message, trained, folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    places = {"out": trained, "data": folder / "data", "bert": empty}
    assert main([word.format(**places) for word in words]) == 2
    told = capsys.readouterr().err.splitlines()
    assert message in told[-1]
    assert not any("Traceback" in line for line in told)


def test_a_recipe_with_an_unknown_name_is_refused(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("modle: x\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "Did you mean 'model'" in capsys.readouterr().err


def test_python_objects_in_a_recipe_are_not_made(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("model: !!python/object/apply:os.getcwd []\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "not YAML" in capsys.readouterr().err


def test_help_lists_commands_and_flags(capsys):
    assert main(["--help"]) == 0
    assert "calibrate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--help"])
    assert stop.value.code == 0
    assert "--target" in capsys.readouterr().out


def test_an_unknown_flag_is_refused_with_the_nearest(capsys):
    assert main(["calibrate", "--model", "x", "--polcy", "beem-a"]) == 2
    assert "Did you mean --policy" in capsys.readouterr().err


def test_a_recipe_may_be_joined_to_its_flag_and_hold_mappings(trained, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"model: {trained}\npolicy: beem-c\noptions:\n  layer_cost: 0.4\n")
    assert main(["calibrate", f"--config={tmp_path / 'recipe.yaml'}"]) == 0
    policy = ee.EarlyExitBertForSequenceClassification.from_pretrained(trained).exit_policy
    assert policy.weights == pytest.approx((0.4, 0.8, 1.2, 1.6))


def test_data_without_a_label_column_is_refused(folder, tmp_path, capsys):
    (tmp_path / "train.csv").write_text("text,labels\nw5,0\nw6,1\n")
    assert main(["train", "--config", str(folder / "recipe.yaml"), "--dataset", str(tmp_path), "--held_back", "0.5"]) == 2
    assert "No column 'label' among text, labels" in capsys.readouterr().err


@pytest.mark.slow
def test_gates_are_trained_by_reward_calibrated_and_taken_up_again(folder, tmp_path, capsys):
    out = str(tmp_path / "gated")
    words = ["consistentee", "--config", str(folder / "recipe.yaml"), "--output_dir", out, "--gate_learning_rate", "3e-3"]
    assert main(words) == 0
    assert "03-gates" in capsys.readouterr().out
    assert main(["calibrate", "--model", out, "--policy", "gate", "--target", "max-drop:0.02"]) == 0
    model = ee.EarlyExitBertForSequenceClassification.from_pretrained(out)
    assert model.exit_policy.name == "gate"
    assert ee.ExitTrace.load(tmp_path / "gated" / "held-back.safetensors").scalars["gate"].shape == (100, 3)
    assert main(words) == 2
    assert "resume_from_checkpoint=True" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0


def test_ids_come_from_the_content_of_rows_whatever_their_order():
    rows = Dataset.from_dict({"text": ["a", "b", "a", "c"], "label": [0, 1, 0, 1]})
    made, shuffled = with_ids(rows, "idx"), with_ids(rows.select([3, 2, 1, 0]), "idx")
    assert len(set(made["idx"][:])) == 4
    assert set(zip(made["idx"][:], made["text"][:], strict=True)) == set(
        zip(shuffled["idx"][:], shuffled["text"][:], strict=True)
    )
    assert with_ids(made, "idx") is made
