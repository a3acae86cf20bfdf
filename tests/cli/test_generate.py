"""Language models and captioners on the command line: thresholds and drafts are chosen, kept, and served from files."""

import json

import pandas
import pytest
import torch
from transformers import BertTokenizer

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.generation.draft_calibration import LAYER_CALLS
from tests.captions.toy import make_pictures, save_all
from tests.generation.conftest import LAYERS, PAD, WORDS, confidence, shape, stock_class
from tests.hub.toy import make_model, make_tokenizer
from tests.serving.test_pictures import as_bytes

VOCABULARY = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{number}" for number in range(5, WORDS))]
PROMPTS = [f"w{5 + 7 * number} w{30 + number} w{80 - number}" for number in range(6)]
QUIET = ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "--logging_strategy", "no"]
SHORT = ["--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a language model of which many drafts are right, prompts, and a classifier and captioner beside it."""
    root = tmp_path_factory.mktemp("writing")
    torch.manual_seed(0)
    fields = {**shape("gpt2"), "eos_token_id": None, "pad_token_id": PAD}
    model = ee.EarlyExitGPT2LMHeadModel(ee.EarlyExitGPT2LMConfig(**fields, exit_layers=[1, 2, LAYERS])).eval()
    with torch.no_grad():
        for block in model.transformer.h[1:]:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight *= 0.15
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=40)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}w40"
    ee.save(model, root / "model", tokenizer=tokenizer, card=False)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    pandas.DataFrame({"question": PROMPTS, "answer": ["w5 w6"] * len(PROMPTS)}).to_csv(root / "prompts.csv", index=False)
    ee.save(make_model(), root / "classifier", tokenizer=make_tokenizer(), card=False)
    save_all(root / "captioner")
    rows = [{"image": as_bytes(picture), "captions": ["w5 w6", "w9"]} for picture in make_pictures()]
    pandas.DataFrame(rows).to_parquet(root / "photos.parquet")
    return root


@pytest.fixture
def model(made, tmp_path):
    """The folder of a copy, to be written into."""
    loaded = ee.from_pretrained(made / "model")
    ee.save(loaded, tmp_path / "model", tokenizer=BertTokenizer.from_pretrained(made / "model"), card=False)
    return tmp_path / "model"


def told(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_thresholds_are_chosen_by_texts_and_served(made, model, capsys, tmp_path):
    chosen = told(capsys, "calibrate", model, "--dataset", made / "prompts.txt", "--target", "speed-up:2.5",
                  "--proposals", 4, *SHORT)  # fmt: skip
    assert chosen["format"] == "hf_earlyexit.generation-calibration/1"
    assert chosen["layer_speed_up"] >= 2.5
    assert chosen["num_rows"] == len(PROMPTS)
    assert chosen["generation"] == {"max_new_tokens": 8, "do_sample": False}
    loaded = ee.from_pretrained(model)
    assert loaded.exit_policy.to_dict() == chosen["policy"]
    assert ee.calibration.CalibrationResult.load(model / "calibration.json").mean_layers == chosen["mean_layers"]
    judged = told(capsys, "evaluate", model, "--dataset", made / "prompts.txt", *SHORT, "--time", "true", "--repeats", 1)
    for name in ("quality", "full_quality", "standard_error", "mean_layers"):
        assert judged[name] == pytest.approx(chosen[name]), "the same rows, so the same figures"
    assert (judged["target"]["kept"], judged["target"]["unit"]) == (True, "layers")
    assert judged["same_texts"] < judged["rows"] == len(PROMPTS)
    assert sum(judged["exit_shares"].values()) == pytest.approx(1)
    assert judged["time"]["speed_up"] > 0
    early, full = tmp_path / "early.jsonl", tmp_path / "full.csv"
    words = ["generate", model, "--input", made / "prompts.txt", *SHORT]
    wrote = told(capsys, *words, "--output", early, "--batch_size", 3)
    assert wrote["mean_exit_layer"] == pytest.approx(chosen["mean_layers"])
    assert (wrote["rows"], wrote["tokens"], wrote["num_layers"]) == (len(PROMPTS), 8 * len(PROMPTS), LAYERS)
    pipe = ee.pipeline("text-generation", model=str(model))
    for prompt, row in zip(PROMPTS, lines(early), strict=True):
        answer = pipe(prompt, max_new_tokens=8, do_sample=False, return_full_text=False)[0]
        assert row == {"text": prompt, **{name: answer[name] for name in row if name != "text"}}
    assert told(capsys, *words, "--output", full, "--early_exit", "false")["mean_exit_layer"] == LAYERS
    table = pandas.read_csv(full)
    assert list(table.columns) == ["text", "generated_text", "exit_layers", "mean_exit_layer"]
    assert set(table.generated_text) != {row["generated_text"] for row in lines(early)}
    stdout = told(capsys, *words)
    assert stdout["answers"] == lines(early), "a batch changes no text"


def test_drafts_are_chosen_and_lose_nothing(made, model, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_earlyexit.generation.draft_calibration.measure_costs", lambda *_: LAYER_CALLS)
    given = ["--dataset", made / "prompts.csv", "--text_column", "question", "--chat", "true", *SHORT]
    chosen = told(capsys, "calibrate", model, "--lossless", "true", *given)
    assert (chosen["operating_point"], chosen["texts"]) == ("lossless", len(PROMPTS))
    assert chosen["expected_speed_up"] > 1 < LAYERS / chosen["expected"]["layer_calls"]
    loaded = ee.from_pretrained(model)
    assert loaded.exit_policy is None, "texts without --lossless stay in full"
    assert loaded.policy_at("lossless").to_dict() == chosen["policy"]
    assert loaded.config.exit_drafts == chosen["drafts"]
    words = ["generate", model, "--input", made / "prompts.csv", *given[2:]]
    drafted = told(capsys, *words, "--lossless", "true", "--output", tmp_path / "drafted.jsonl")
    full = told(capsys, *words, "--output", tmp_path / "full.jsonl")
    assert drafted["layer_calls"] < full["tokens"] * LAYERS
    judged = told(capsys, "evaluate", model, "--dataset", *given[1:], "--lossless", "true", "--batch_size", 1)
    assert judged["same_texts"] == judged["rows"] == len(PROMPTS)
    assert judged["full_layer_calls"] == (full["tokens"] - len(PROMPTS)) * LAYERS
    assert {name: judged[name] for name in ("drafted", "accepted", "layer_calls")} == {
        name: drafted[name] for name in ("drafted", "accepted", "layer_calls")
    }
    assert drafted["drafted"] >= drafted["accepted"] > 0
    assert "drafted" not in full
    for one, two in zip(lines(tmp_path / "drafted.jsonl"), lines(tmp_path / "full.jsonl"), strict=True):
        assert one["generated_text"] == two["generated_text"]
        assert (one["question"], one["answer"]) == (two["question"], two["answer"])
        assert min(one["exit_layers"]) < LAYERS == min(two["exit_layers"])


def test_exits_and_gates_learn_from_texts(made, capsys, tmp_path):
    """From a plain checkpoint: the network stays as it is, its new exits and gates change, and gates choose who leaves."""
    (tmp_path / "plain").mkdir()
    stock = stock_class("gpt2")(stock_class("gpt2").config_class(**shape("gpt2")))
    stock.save_pretrained(tmp_path / "plain")
    BertTokenizer.from_pretrained(made / "model", eos_token="[SEP]").save_pretrained(tmp_path / "plain")
    (tmp_path / "texts.txt").write_text("\n".join(PROMPTS * 6) + "\n")
    settings = ["--objective", "two-stage", "--max_length", 12, "--exit_layers", 2, LAYERS, "--held_back", 0.25, *QUIET]
    given = [tmp_path / "plain", "--dataset", tmp_path / "texts.txt", *settings]
    trained = told(capsys, "train", *given, "--output_dir", tmp_path / "exits", "--max_steps", 3, "--learning_rate", 1e-2)
    assert trained["held_back"] is None
    assert 0 <= trained["metrics"]["eval_exit_2_agreement"] <= 1 == trained["metrics"][f"eval_exit_{LAYERS}_agreement"]
    model = ee.from_pretrained(tmp_path / "exits")
    assert type(model) is ee.EarlyExitGPT2LMHeadModel
    assert (model.config.exit_head, model.exit_layers) == ("tuned", (2, LAYERS))
    for name, weight in stock.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert model.exit_heads["2"].shift.weight.abs().sum() > 0, "a new one is 0"
    joint = ["--objective_options", '{"curriculum": "gradual"}', *settings[2:]]
    joint = [*given[:3], "--objective", "layerskip", *joint, "--output_dir", tmp_path / "joint", "--max_steps", 2]
    trained = told(capsys, "train", *joint)
    assert "eval_exit_2_loss" in trained["metrics"]
    model = ee.from_pretrained(tmp_path / "joint")
    assert (model.config.exit_head, model.exit_layers) == ("tied", (2, LAYERS)), "the model's own head for all exits"
    assert not torch.equal(model.transformer.h[0].mlp.c_fc.weight, stock.transformer.h[0].mlp.c_fc.weight)
    phases = ["--exit_gate", "linear", "--chosen_epochs", 0, "--num_train_epochs", 1, "--alpha", 0.2]
    gated = told(capsys, "consistentee", *given, *phases, "--output_dir", tmp_path / "gates")
    assert gated["held_back"] is None
    assert 2 <= gated["phases"][-1]["gate_layers"] <= LAYERS
    words = ["--dataset", made / "prompts.txt", "--policy", "gate", "--target", "speed-up:1", "--proposals", 2, *SHORT]
    assert told(capsys, "calibrate", tmp_path / "gates", *words)["policy"]["name"] == "gate"


def test_a_captioner_is_calibrated_by_the_same_command(made, capsys):
    """In place: no other test uses its thresholds."""
    words = [
        "--dataset",
        made / "photos.parquet",
        "--label_column",
        "captions",
        "--proposals",
        3,
        "--target",
        "layer-budget:3.9",
    ]
    chosen = told(capsys, "calibrate", made / "captioner", *words, "--operating_point", "new", "--max_new_tokens", 5)
    assert (chosen["num_rows"], chosen["metric"]) == (6, "rouge_l against references")
    again = ee.EarlyExitVisionEncoderDecoder.from_pretrained(made / "captioner")
    assert again.policy_at("new").to_dict() == chosen["policy"]


def test_drafts_of_a_captioner_are_chosen_and_lose_nothing(made, capsys, tmp_path, monkeypatch):
    """Kept, loaded and used by `caption` and `evaluate`; captions are greedy, whatever the config says of beams."""
    monkeypatch.setattr("hf_earlyexit.generation.draft_calibration.measure_costs", lambda *_: LAYER_CALLS)
    captioner = save_all(tmp_path / "captioner")
    captioner.generation_config.num_beams = 2
    captioner.save_pretrained(tmp_path / "captioner")
    for number, picture in enumerate(make_pictures()):
        picture.save(tmp_path / f"{number}.png")
    given = [tmp_path / "captioner", "--dataset", made / "photos.parquet", "--max_new_tokens", 8]
    chosen = told(capsys, "calibrate", *given, "--lossless", "true")
    assert (chosen["operating_point"], chosen["texts"]) == ("lossless", 6)
    loaded = ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path / "captioner")
    assert loaded.policy_at("lossless").to_dict() == chosen["policy"]
    assert loaded.config.exit_drafts == chosen["drafts"]
    assert loaded.exit_policy == captioner.exit_policy, "captions without --lossless are what they were"
    judged = told(capsys, "evaluate", *given, "--lossless", "true")
    assert judged["same_texts"] == judged["rows"] == 6
    loaded.set_operating_points({"lossless": ee.ConfidencePolicy(thresholds=(0.05,) * 3)}, keep_others=True)
    loaded.save_pretrained(tmp_path / "captioner")  # one that drafts much, of which much is wrong
    words = ["caption", tmp_path / "captioner", *(tmp_path / f"{number}.png" for number in range(6)), "--max_new_tokens", 8]
    drafted = told(capsys, *words, "--num_beams", 1, "--lossless", "true")
    full = told(capsys, *words, "--num_beams", 1, "--operating_point", "exact")
    assert [one["tokens"] for one in drafted["captions"]] == [one["tokens"] for one in full["captions"]]
    assert full["mean_exit_layer"] == drafted["num_layers"]
    judged = told(capsys, "evaluate", *given, "--lossless", "true", "--batch_size", 1)
    assert (judged["same_texts"], judged["drafted"] > judged["accepted"]) == (6, True)
    assert judged["tokens"] == sum(len(one["tokens"]) for one in full["captions"])
    assert judged["full_layer_calls"] == judged["tokens"] * full["num_layers"], "first words may be drafts"
    capsys.readouterr()
    assert main([*map(str, words), "--lossless", "true"]) == 2
    assert "num_beams is 2" in capsys.readouterr().err
    assert main([*map(str, words), "--num_beams", "1", "--lossless", "true", "--operating_point", "exact"]) == 2
    assert "run `hf-earlyexit calibrate` with it first" in capsys.readouterr().err


def test_a_stopped_run_goes_on(made, model, capsys, tmp_path, monkeypatch):
    loaded = ee.from_pretrained(model)
    loaded.set_exit_policy(confidence(loaded, 0.5))
    loaded.save_pretrained(model)
    words = ["generate", str(model), "--input", str(made / "prompts.txt"), *SHORT, "--output", str(tmp_path / "out.jsonl")]
    assert main(words) == 0
    assert f"{len(PROMPTS)} texts, mean layer" in capsys.readouterr().out
    whole = (tmp_path / "out.jsonl").read_text()
    monkeypatch.setattr("hf_earlyexit.cli.outgoing.WINDOW", 2)
    made_of = type(loaded).generate

    def fails(self, *args, **kwargs):
        if kwargs["input_ids"][0, 1] == 5 + 7 * 4:
            raise KeyboardInterrupt
        return made_of(self, *args, **kwargs)

    monkeypatch.setattr(type(loaded), "generate", fails)
    again = [word.replace("out.jsonl", "again.jsonl") for word in words]
    assert main(again) == 130
    assert main(again) == 2
    assert "--resume true" in capsys.readouterr().err
    monkeypatch.setattr(type(loaded), "generate", made_of)
    assert main([*again, "--resume", "true"]) == 0
    assert (tmp_path / "again.jsonl").read_text() == whole
    assert "4 texts are of the run that was stopped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("generate {model} --input {none}", "nowhere.txt"),
        ("generate {model} --input {prompts} --batch_size 0", "batch_size is 0"),
        ("generate {model} --input {prompts} --max_new_tokens 0", "max_new_tokens is 0"),
        ("generate {model} --input {prompts} --lossless true", "run `hf-earlyexit calibrate` with it first"),
        ("generate {model} --input {prompts} --operating_point fast", "operating point"),
        ("generate {model} --input {prompts} --output texts.doc", "a name that ends in"),
        ("generate {model} --input {prompts} --resume true", "name an --output"),
        ("generate {model} --input {prompts} --options 3", "a JSON object"),
        ("generate {model} --input {prompts} --options {{", "expected JSON"),
        ('generate {model} --input {prompts} --options {{"lossless":true}}', "give --lossless"),
        ('generate {model} --input {prompts} --options {{"input_ids":1}}', "each prompt gets one text"),
        ('generate {model} --input {prompts} --options {{"tempratur":1}}', "tempratur"),
        ("generate {classifier} --input {prompts}", "EarlyExitBertForSequenceClassification, which this command is not for"),
        ("predict {model} --input {prompts}", "EarlyExitGPT2LMHeadModel, which this command is not for"),
        ("train {model} --dataset {prompts} --output_dir out --label_column x", "--label_column is for classifiers"),
        ("train {model} --dataset {csv} --output_dir out --text_column question answer", "pairs of texts"),
        ("calibrate {model}", "Name prompts to choose on with --dataset"),
        ("calibrate {captioner}", "Name pictures to choose on with --dataset"),
        ("calibrate {captioner} --dataset {photos} --chat true", "--chat is for language models"),
        ("calibrate {captioner} --dataset {photos} --lossless true --label_column captions", "only time is left to choose"),
        ("calibrate {captioner} --dataset {photos} --label_column caption", "No column 'caption'"),
        ("calibrate {model} --dataset {prompts} --metric accuracy", "--metric is for classifiers"),
        ("calibrate {model} --dataset {prompts} --form int8", "--form is for classifiers"),
        ("calibrate {model} --dataset {prompts} --lossless true --target max-drop:0.1", "only time is left to choose for"),
        ("calibrate {model} --dataset {prompts} --target final-layer-error", "MaxDrop, SpeedUp, LayerBudget or Certified"),
        ("calibrate {model} --dataset {csv} --text_column question --split train", "tagged 'train'"),
        ("calibrate {model} --dataset {prompts} --split test", "a text file, which has no split 'test'"),
        ("calibrate {model} --dataset {prompts} --policy gate", "gate policy cannot decide"),
        ("calibrate {classifier} --dataset {prompts} --lossless true", "--lossless is for captioners and language models"),
        ("calibrate {classifier} --dataset {prompts} --max_new_tokens 5", "this is a classifier"),
        ("evaluate {classifier} --dataset {csv} --chat true", "this is a classifier"),
        ("evaluate {model} --dataset {prompts}", "has no exit policy"),
        ("evaluate {model} --dataset {prompts} --metric accuracy", "--metric is for classifiers"),
    ],
)
def test_mistakes_are_told_in_one_line(made, capsys, words, message):
    places = {name: made / name for name in ("model", "classifier", "captioner")}
    places |= {
        "prompts": made / "prompts.txt",
        "photos": made / "photos.parquet",
        "none": made / "nowhere.txt",
        "csv": made / "prompts.csv",
    }
    capsys.readouterr()
    assert main(words.format(**places).split()) == 2
    answer = capsys.readouterr()
    assert answer.out == ""
    assert message in answer.err.splitlines()[-1]
    assert "Traceback" not in answer.err
