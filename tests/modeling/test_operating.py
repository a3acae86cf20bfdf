"""Several policies in one model, chosen by name at call time."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import AutoModel

import hf_earlyexit as ee
from hf_earlyexit.cli.main import main
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, PolicyError, UnknownNameError, UsageError
from tests.hub.toy import calibrate, make_model, make_tokenizer, texts, told


@pytest.fixture(scope="module")
def results():
    return dict(zip(("fast", "balanced"), calibrate(make_model()), strict=True))


@pytest.fixture(scope="module")
def model(results):
    model = make_model()
    model.set_operating_points(results, default="balanced")
    return model


def with_policy(policy):
    model = make_model()
    model.set_exit_policy(policy)
    return told(model)


def test_the_default_serves_unless_another_is_named(model, results):
    fast, balanced, full = (with_policy(policy) for policy in (results["fast"], results["balanced"], None))
    assert fast != balanced != full
    assert told(model) == told(model, point="balanced") == balanced
    assert told(model, point="fast") == fast
    assert told(model, point="exact") == full
    assert model.operating_points == ("exact", "fast", "balanced")


def test_forward_takes_the_name(model, random_batch):
    batch = random_batch(8)
    with torch.inference_mode():
        exact = model(**batch, operating_point="exact")
        assert torch.equal(exact.exit_logits, model(**batch, early_exit=False).exit_logits)
        assert model(**batch, operating_point="fast", early_exit=True).exit_logits is None


def test_explain_and_pipeline_take_the_name(model):
    tokenizer = make_tokenizer()
    labels, layers = told(model, point="fast")
    assert [ee.explain(model, text, tokenizer=tokenizer, operating_point="fast").exit_layer for text in texts()] == layers
    made = ee.pipeline(model=model, tokenizer=tokenizer, operating_point="fast")
    assert [one["exit_layer"] for one in made(texts())] == layers
    assert [one["exit_layer"] for one in made(texts(), operating_point="balanced")] == told(model)[1]
    assert {one["exit_layer"] for one in made(texts(), operating_point="exact")} == {4}
    assert [one["exit_layer"] for one in made(texts())] == layers
    called = ee.pipeline(model=model, tokenizer=tokenizer)
    assert [int(one["label"][-1]) for one in called(texts(), batch_size=4, operating_point="fast")] == labels
    with pytest.raises(UsageError, match="nothing to explain"):
        ee.explain(model, "w5", tokenizer=tokenizer, operating_point="exact")


@pytest.mark.parametrize(
    "call",
    [
        lambda model, tokenizer: model(torch.tensor([[5, 6]]), operating_point="fats"),
        lambda model, tokenizer: ee.predict(model, ["w5"], tokenizer=tokenizer, operating_point="fats"),
        lambda model, tokenizer: ee.explain(model, "w5", tokenizer=tokenizer, operating_point="fats"),
        lambda model, tokenizer: ee.pipeline(model=model, tokenizer=tokenizer, operating_point="fats"),
        lambda model, tokenizer: ee.pipeline(model=model, tokenizer=tokenizer)("w5", operating_point="fats"),
        lambda model, tokenizer: model.set_operating_points({"fast": ee.policies.StaticPolicy.at(0, 4)}, default="fats"),
    ],
)
def test_an_unknown_name_gets_a_suggestion(model, call):
    with pytest.raises(UnknownNameError, match=r"Unknown operating point 'fats'. Did you mean 'fast'\? Known: "):
        call(model, make_tokenizer())


def test_contradictions_and_training_are_refused(model, random_batch):
    batch = random_batch(2)
    for words in ({"operating_point": "fast", "early_exit": False}, {"operating_point": "exact", "early_exit": True}):
        with pytest.raises(UsageError, match="contradicts operating_point"):
            model(**batch, **words)
    model.train()
    try:
        with pytest.raises(UsageError, match="in training mode"):
            model(**batch, operating_point="fast")
        assert model(**batch, operating_point="exact").exit_logits is not None
    finally:
        model.eval()


def test_points_travel_with_the_folder(model, results, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    for point in (None, *model.operating_points):
        assert loaded.policy_at(point) == model.policy_at(point)
        assert told(loaded, point=point) == told(model, point=point)


def test_points_can_be_replaced_and_taken_off(results):
    model = make_model()
    model.set_operating_points({"fast": results["fast"].policy})
    assert model.exit_policy is None
    assert model.config.exit_point_certificates is None
    model.set_operating_points(results, default="fast")
    assert model.config.exit_certificate == model.config.exit_point_certificates["fast"]
    model.set_operating_points(results, default="exact")
    assert model.exit_policy is model.config.exit_certificate is None
    model.set_operating_points(None)
    assert model.operating_points == ("exact",)


@pytest.mark.parametrize(
    ("points", "error", "message"),
    [
        ({"exact": ee.ConfidencePolicy(thresholds=[0.5] * 3)}, EarlyExitConfigError, "the full model"),
        ({"default": ee.ConfidencePolicy(thresholds=[0.5] * 3)}, EarlyExitConfigError, "serves without a name"),
        ({"": ee.ConfidencePolicy(thresholds=[0.5] * 3)}, EarlyExitConfigError, "not empty"),
        ({"a": ee.ConfidencePolicy(thresholds=[0.5] * 2)}, EarlyExitConfigError, "3 thresholds"),
        ({"a": {"name": "confidence"}}, UsageError, "expected an ExitPolicy"),
    ],
)
def test_points_that_cannot_work_change_nothing(model, results, points, error, message):
    before = model.config.to_dict()
    with pytest.raises(error, match=message):
        model.set_operating_points({**results, **points}, default="fast")
    assert model.config.to_dict() == before


def test_a_calibration_of_other_heads_is_refused(results):
    with pytest.raises(CheckpointError, match=r"chosen on (a|another) model"):
        make_model(seed=1).set_operating_points(results)


@pytest.mark.parametrize(
    ("points", "error"),
    [
        ({"a": {"name": "confidence", "thresholds": [2.0] * 3}}, PolicyError),
        ({"a": {"name": "confidense", "thresholds": [0.5] * 3}}, UnknownNameError),
        ({"a": {"name": "confidence", "thresholds": [0.5]}}, EarlyExitConfigError),
        ({"exact": {"name": "confidence", "thresholds": [0.5] * 3}}, EarlyExitConfigError),
        ({"a": 3}, StrictDataclassFieldValidationError),
        ([], StrictDataclassFieldValidationError),
    ],
)
def test_the_config_checks_points_as_it_checks_the_policy(tiny_config, points, error):
    with pytest.raises(error):
        tiny_config(exit_operating_points=points)


def test_the_command_line_takes_the_name(model, tmp_path, capsys):
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "texts.txt").write_text("w5 w6\n")
    assert main(["predict", str(tmp_path), "--input", str(tmp_path / "texts.txt"), "--operating_point", "fast"]) == 0
    assert main(["predict", str(tmp_path), "--input", str(tmp_path / "texts.txt"), "--operating_point", "fats"]) == 2
    assert "Did you mean 'fast'" in capsys.readouterr().err


def test_a_point_set_anew_beside_the_others_has_its_own_certificate_and_not_the_former(results):
    model = make_model()
    model.set_operating_points(results)
    kept = model.config.exit_point_certificates["balanced"]
    model.set_operating_points({"fast": results["balanced"]}, keep_others=True)
    assert model.operating_points == ("exact", "fast", "balanced")
    assert model.policy_at("fast") == results["balanced"].policy
    assert model.config.exit_point_certificates == {"fast": kept, "balanced": kept}
    model.set_operating_points({"fast": results["fast"].policy}, keep_others=True)  # a bare policy: nothing vouches for it
    assert model.config.exit_point_certificates == {"balanced": kept}
    assert model.policy_at("fast") == results["fast"].policy
    model.set_operating_points({"new": results["fast"]}, default="new", keep_others=True)
    assert model.config.exit_certificate == model.config.exit_point_certificates["new"] != kept
    assert set(model.config.exit_point_certificates) == {"new", "balanced"}
    model.set_operating_points({"new": results["fast"]})
    assert set(model.config.exit_point_certificates) == {"new"}
    assert model.operating_points == ("exact", "new")
