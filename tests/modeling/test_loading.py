"""The two-way street between stock checkpoints and ours, and what is refused at the door."""

import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
)
from transformers.utils import logging

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, PolicyError, UnknownNameError
from hf_earlyexit.modeling.fingerprint import model_fingerprint
from hf_earlyexit.modeling.heads import HEADS

Door = ee.EarlyExitBertForSequenceClassification
HEAD_TENSOR = "exit_heads.2.classifier.weight"


@pytest.fixture(autouse=True)
def _fresh_warnings():
    logging.warning_once.cache_clear()


@pytest.fixture(scope="module")
def stock_config(tiny_config):
    values = tiny_config().to_dict()
    return BertConfig(
        **{k: v for k, v in values.items() if k in BertConfig().to_dict() and k not in ("model_type", "architectures")}
    )


@pytest.fixture(scope="module")
def stock_folder(stock_config, tmp_path_factory):
    """`stock_folder(cls)`: a saved plain checkpoint of a stock class, seeded."""

    def make(cls):
        folder = tmp_path_factory.mktemp(cls.__name__)
        torch.manual_seed(7)
        cls(stock_config).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def saved(tiny_model, tmp_path):
    """A saved model with four exits and a policy."""
    model = tiny_model()
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.1 + 0.2, None, 1 / 3]))
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def answers(model, batch, **kwargs):
    with torch.inference_mode():
        return model.eval()(**batch, **kwargs).logits


# --- from plain checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "new"),
    [
        (BertForSequenceClassification, ("exit_heads.",)),
        (BertModel, ("exit_heads.", "classifier.")),
        (BertForMaskedLM, ("exit_heads.", "classifier.", "bert.pooler.")),
    ],
)
def test_a_plain_checkpoint_loads_and_only_what_it_lacks_is_new(stock_folder, cls, new):
    folder = stock_folder(cls)
    model, info = Door.from_pretrained(folder, num_labels=3, output_loading_info=True)
    expected = {name for name in model.state_dict() if name.startswith(new)}
    assert set(info["missing_keys"]) == expected
    stored = load_file(folder / "model.safetensors")
    prefix = "" if any(name.startswith("bert.") for name in stored) else "bert."
    loaded = model.state_dict()
    shared = [name for name in stored if prefix + name in loaded]
    assert len(shared) >= 4 * 16  # 16 tensors a layer
    assert all(torch.equal(stored[name], loaded[prefix + name]) for name in shared)
    assert all(torch.isfinite(value).all() for value in loaded.values())


def test_untrained_exits_are_announced_once_and_clearly(stock_folder, caplog):
    folder = stock_folder(BertForSequenceClassification)
    Door.from_pretrained(folder, num_labels=3)
    Door.from_pretrained(folder, num_labels=3)
    said = [record.getMessage() for record in caplog.records if "exits are new" in record.getMessage()]
    assert len(said) == 1
    assert "train them" in said[0]


@pytest.mark.parametrize("rows", [1, 8])
def test_a_fine_tuned_classifier_keeps_its_answers_to_the_bit(stock_folder, random_batch, rows):
    folder = stock_folder(BertForSequenceClassification)
    batch = random_batch(rows, seed=3)
    stock = answers(BertForSequenceClassification.from_pretrained(folder), batch)
    assert torch.equal(answers(Door.from_pretrained(folder), batch), stock)
    assert not torch.equal(stock, torch.zeros_like(stock))


def test_the_stock_class_reads_our_folder_and_gives_the_full_models_answers(saved, random_batch):
    batch = random_batch(8, seed=4)
    ours = answers(Door.from_pretrained(saved), batch, early_exit=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers tells that the model types differ
        stock = BertForSequenceClassification.from_pretrained(saved, num_labels=3)
    assert type(stock) is BertForSequenceClassification
    assert torch.equal(answers(stock, batch), ours)


def test_a_plain_checkpoint_takes_exits_and_labels_by_keyword(stock_folder):
    model = Door.from_pretrained(stock_folder(BertModel), num_labels=5, exit_layers=[2, 4], exit_head="pooler")
    assert model.exit_layers == (2, 4)
    assert list(model.exit_heads) == ["2"]
    assert model.exit_heads["2"].classifier.weight.shape == (5, 32)
    assert model.config.model_type == "early_exit_bert"


def test_another_number_of_labels_than_the_checkpoints_is_refused_with_both_shapes(stock_folder):
    with pytest.raises(CheckpointError, match=r"classifier\.(weight|bias): found \[3.*expected \[7"):
        Door.from_pretrained(stock_folder(BertForSequenceClassification), num_labels=7)


# --- our own folders ----------------------------------------------------------------------------------------------------


def test_auto_classes_load_our_folder(saved, random_batch):
    assert type(AutoConfig.from_pretrained(saved)) is ee.EarlyExitBertConfig
    models = [auto.from_pretrained(saved) for auto in (AutoModel, AutoModelForSequenceClassification)]
    assert all(type(model) is Door for model in models)
    batch = random_batch(4)
    own = Door.from_pretrained(saved)
    assert all(torch.equal(answers(model, batch), answers(own, batch)) for model in models)


@pytest.mark.parametrize("head", HEADS.names())
@pytest.mark.parametrize("layers", [[1, 2, 3, 4], [2, 4], [4]])
def test_saving_and_loading_is_exact_for_every_head_and_choice_of_exits(tiny_model, random_batch, tmp_path, head, layers):
    model = tiny_model(exit_head=head, exit_layers=layers)
    model.set_exit_policy(ee.ConfidencePolicy(thresholds=[0.6] * (len(layers) - 1), exit_layers=layers))
    model.save_pretrained(tmp_path)
    loaded = Door.from_pretrained(tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = random_batch(16)
    with torch.inference_mode():
        first, second = model(**batch), loaded(**batch)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.exit_layer, second.exit_layer)
    assert set(first.exit_layer.tolist()) <= set(layers)


def test_thresholds_are_exact_when_loaded_in_bfloat16(saved):
    model = AutoModel.from_pretrained(saved, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.exit_policy.thresholds == (0.1 + 0.2, None, 1 / 3)


def test_saving_marks_the_folder_with_the_format(saved):
    assert json.loads((saved / "config.json").read_text())["early_exit_version"] == "1.0"


def test_a_newer_minor_format_loads_with_a_warning(saved, caplog):
    edit_config(saved, early_exit_version="1.7")
    assert type(AutoModel.from_pretrained(saved)) is Door
    assert any("saved in format 1.7; this library knows 1.0" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("version", "expected"), [("2.0", "at most 1.x; upgrade"), ("new", "a version such as")])
def test_a_newer_major_or_malformed_format_is_refused(saved, version, expected):
    edit_config(saved, early_exit_version=version)
    with pytest.raises(EarlyExitConfigError, match=expected):
        AutoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"exit_layers": [1, 3]}, EarlyExitConfigError, "exit_layers is"),
        ({"exit_layers": [4, 2]}, EarlyExitConfigError, "exit_layers is"),
        ({"exit_policy": {"name": "confidence", "thresholds": [0.5]}}, EarlyExitConfigError, "exit_policy is"),
        ({"exit_policy": {"name": "confidence", "thresholds": [2.0, 0.5, 0.5]}}, PolicyError, "thresholds"),
        ({"exit_policy": {"name": "confidance", "thresholds": [0.5] * 3}}, UnknownNameError, "Did you mean 'confidence'"),
        ({"exit_head": "linear-max"}, UnknownNameError, "Unknown exit head"),
        ({"exit_cost": [1, 2]}, EarlyExitConfigError, "exit_cost is"),
        ({"early_exit_version": "9.0"}, EarlyExitConfigError, "early_exit_version is"),
        ({"num_hidden_layers": 10**9}, EarlyExitConfigError, "num_hidden_layers is"),
    ],
)
@pytest.mark.parametrize("auto", [AutoModel, Door])
def test_values_given_while_loading_are_checked(saved, auto, override, error, message):
    with pytest.raises(error, match=message):
        auto.from_pretrained(saved, **override)


def test_a_policy_may_be_given_while_loading(saved):
    policy = ee.policies.PatiencePolicy(thresholds=[None, 1, 2])
    assert AutoModel.from_pretrained(saved, exit_policy=policy.to_dict()).exit_policy == policy


# --- damaged folders ----------------------------------------------------------------------------------------------------


def test_a_missing_head_is_refused_by_name(saved):
    edit_weights(saved, lambda tensors: tensors.pop(HEAD_TENSOR))
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(HEAD_TENSOR)}.*init_missing_exits") as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.field == HEAD_TENSOR
    assert caught.value.path == str(saved)


def test_all_heads_missing_are_all_named(saved):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("exit_heads.")]:
            del tensors[name]

    edit_weights(saved, drop)
    with pytest.raises(CheckpointError) as caught:
        Door.from_pretrained(saved)
    assert all(
        f"exit_heads.{layer}.classifier.{part}" in str(caught.value) for layer in (1, 2, 3) for part in ("weight", "bias")
    )


def test_a_renamed_head_is_named_both_ways(saved):
    edit_weights(saved, lambda tensors: tensors.update({"exit_heads.two.weight": tensors.pop(HEAD_TENSOR)}))
    with pytest.raises(CheckpointError, match=rf"missing: {re.escape(HEAD_TENSOR)}; surplus: exit_heads\.two\.weight"):
        Door.from_pretrained(saved)


def test_a_surplus_head_is_refused_by_name(saved):
    edit_weights(saved, lambda tensors: tensors.update({"exit_heads.9.classifier.bias": torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"surplus: exit_heads\.9\.classifier\.bias"):
        Door.from_pretrained(saved)


def test_tensors_that_belong_to_no_part_are_named_once_and_ignored(saved, caplog, monkeypatch):
    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)  # it keeps to itself, and caplog may follow
    before = Door.from_pretrained(saved).state_dict()
    edit_weights(saved, lambda tensors: tensors.update({"cls.predictions.bias": torch.zeros(3)}))
    after = Door.from_pretrained(saved).state_dict()
    assert len({id(record) for record in caplog.records if "cls.predictions.bias" in record.getMessage()}) == 1
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_missing_backbone_tensor_is_refused_by_name(saved):
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_weights(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        Door.from_pretrained(saved)


def test_init_missing_exits_does_not_excuse_a_missing_backbone_tensor(saved):
    name = "bert.encoder.layer.1.output.dense.weight"
    edit_weights(saved, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=re.escape(name)):
        Door.from_pretrained(saved, init_missing_exits=True)


def test_a_head_of_another_shape_is_refused_with_both_shapes(saved):
    edit_weights(saved, lambda tensors: tensors.update({HEAD_TENSOR: torch.zeros(5, 32)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(HEAD_TENSOR)}: found \[5, 32\], expected \[3, 32\]") as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.field == HEAD_TENSOR


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [HEAD_TENSOR, "exit_heads.3.classifier.bias", "classifier.weight"])
def test_heads_that_are_not_finite_are_refused_by_name(saved, name, value):
    edit_weights(saved, lambda tensors: tensors[name].view(-1)[1:2].fill_(value))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} in .* not finite") as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.field == name


@pytest.mark.parametrize("size", [0, 5, 1000, -100])
def test_a_file_cut_short_is_refused_by_name(saved, size):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    told = f"{re.escape(str(path))} .{path.stat().st_size:,} bytes. cannot be read .*cut short or damaged. Download it again"
    with pytest.raises(CheckpointError, match=told) as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.path == str(path)


def test_init_missing_exits_makes_the_missing_and_drops_the_surplus(saved):
    edit_weights(saved, lambda tensors: tensors.pop(HEAD_TENSOR))
    stored = load_file(saved / "model.safetensors")
    model = AutoModel.from_pretrained(saved, init_missing_exits=True)
    assert torch.isfinite(model.exit_heads["2"].classifier.weight).all()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in stored.items())
    fewer = Door.from_pretrained(saved, init_missing_exits=True, exit_layers=[3, 4], exit_policy=None)
    assert list(fewer.exit_heads) == ["3"]


def test_fewer_exits_than_the_checkpoint_has_must_be_wanted(saved):
    with pytest.raises(CheckpointError, match=r"surplus: exit_heads\.1"):
        Door.from_pretrained(saved, exit_layers=[3, 4], exit_policy=None)


def test_thresholds_of_other_heads_are_refused(tiny_model, random_batch):
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    with torch.inference_mode():
        logits = first(**random_batch(300), early_exit=False).exit_logits
    trace = ee.ExitTrace(
        logits=logits,
        labels=logits[:, -1].argmax(-1),
        exit_layers=first.exit_layers,
        fingerprint=model_fingerprint(first),
    )
    result = ee.calibrate(trace, policy="confidence", target=ee.LayerBudget(3), keep_weak_exits=True)
    first.set_exit_policy(result)
    assert first.exit_policy == result.policy
    with pytest.raises(CheckpointError, match=r"chosen on (a|another) model"):
        second.set_exit_policy(result)
    assert second.exit_policy is None
    first.set_exit_policy(None)
    assert first.exit_policy is None


def test_a_policy_by_name_alone_is_refused(tiny_model):
    with pytest.raises(ee.EarlyExitError, match="expected an ExitPolicy"):
        tiny_model().set_exit_policy("beem-a")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.1.output.LayerNorm.bias", "bert.pooler.dense.weight"],
)
def test_a_weight_of_the_backbone_that_is_not_finite_is_refused_by_name(saved, name, dtype, value):
    edit_weights(saved, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    for load in (Door.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{name} in .* holds values that are not finite") as caught:
            load(saved, dtype=dtype)
        assert (caught.value.field, caught.value.path) == (name, str(saved))


def test_the_largest_finite_weight_is_let_through(saved):
    name = "bert.encoder.layer.1.output.dense.bias"
    edit_weights(saved, lambda tensors: tensors[name].fill_(torch.finfo(torch.float32).max))
    assert Door.from_pretrained(saved).bert.encoder.layer[1].output.dense.bias[0] > 1e38
