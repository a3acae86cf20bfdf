"""Plain checkpoints and stock configs are taken as the stock class takes them; those of another family are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
)

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError
from tests.conftest import SHAPE

DOOR = ee.EarlyExitBertForSequenceClassification
NAMES = {0: "bad", 1: "so-so", 2: "good"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder with a stock classifier of 4 layers and 3 labels."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SHAPE)).save_pretrained(folder)
    return folder


def edited(folder, target, **fields):
    """A copy whose config.json has these fields; `None` takes one out."""
    target.mkdir()
    (target / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    values = json.loads((folder / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    return target


def answers(model, batch):
    with torch.inference_mode():
        return model.eval()(**batch).logits


# --- stock configs ------------------------------------------------------------------------------------------------------


def test_a_stock_config_makes_the_model_that_its_own_makes():
    torch.manual_seed(0)
    stock = DOOR(BertConfig(**SHAPE))
    torch.manual_seed(0)
    own = DOOR(ee.EarlyExitBertConfig(**SHAPE))
    assert type(stock.config) is ee.EarlyExitBertConfig
    assert stock.exit_layers == (1, 2, 3, 4)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in stock.state_dict().items())


def test_a_stock_config_keeps_its_fields():
    config = ee.EarlyExitBertConfig.from_stock(BertConfig(**SHAPE, classifier_dropout=0.3))
    assert (config.classifier_dropout, config.num_labels, config.vocab_size) == (0.3, 3, SHAPE["vocab_size"])


def test_the_config_of_auto_config_loads_the_plain_checkpoint(plain, random_batch):
    config = AutoConfig.from_pretrained(plain)
    model = DOOR.from_pretrained(plain, config=config)
    stock = BertForSequenceClassification.from_pretrained(plain)
    assert torch.equal(answers(model, random_batch(3)), answers(stock, random_batch(3)))
    assert type(config) is BertConfig  # it is not written on


@pytest.mark.parametrize("make", [lambda: RobertaConfig(**SHAPE), ViTConfig, dict])
def test_configs_of_another_family_are_refused(make):
    with pytest.raises(EarlyExitConfigError, match=r"config is .*; expected a EarlyExitBertConfig, or .* model type bert"):
        DOOR(make())


def test_a_config_of_another_family_beside_a_folder_is_refused(plain):
    with pytest.raises(EarlyExitConfigError, match="config is 'RobertaConfig'"):
        DOOR.from_pretrained(plain, config=RobertaConfig(**SHAPE))


# --- names of labels ----------------------------------------------------------------------------------------------------


def test_a_config_with_names_by_number_alone_loads(plain, tmp_path):
    folder = edited(
        plain, tmp_path / "m", id2label={str(n): name for n, name in NAMES.items()}, label2id=None, num_labels=None
    )
    config = DOOR.from_pretrained(folder).config
    assert (config.num_labels, config.id2label) == (3, NAMES)
    assert config.label2id == {name: number for number, name in NAMES.items()}


def test_names_by_number_alone_may_be_given(plain):
    assert ee.EarlyExitBertConfig(**{**SHAPE, "num_labels": 3}, id2label=NAMES).label2id["good"] == 2
    assert DOOR.from_pretrained(plain, id2label=NAMES).config.label2id == {name: number for number, name in NAMES.items()}


@pytest.mark.parametrize("label2id", [{"bad": 0, "good": 1}, {"bad": 0}])
def test_names_that_do_not_fit_each_other_are_refused(label2id):
    with pytest.raises(EarlyExitConfigError, match="label2id"):
        ee.EarlyExitBertConfig(**SHAPE, id2label=NAMES, label2id=label2id)


# --- another depth ------------------------------------------------------------------------------------------------------


def test_fewer_layers_have_fewer_exits(plain, random_batch):
    model = DOOR.from_pretrained(plain, num_hidden_layers=2)
    stock = BertForSequenceClassification.from_pretrained(plain, num_hidden_layers=2)
    assert model.exit_layers == (1, 2)
    assert list(model.exit_heads) == ["1"]
    assert torch.equal(answers(model, random_batch(3)), answers(stock, random_batch(3)))


def test_exits_that_were_given_must_fit_the_depth(plain):
    assert DOOR.from_pretrained(plain, num_hidden_layers=3, exit_layers=[2, 3]).exit_layers == (2, 3)
    with pytest.raises(EarlyExitConfigError, match="exit_layers"):
        DOOR.from_pretrained(plain, num_hidden_layers=2, exit_layers=[1, 2, 3, 4])


def test_more_layers_than_the_checkpoint_has_are_refused(plain):
    with pytest.raises(CheckpointError, match=r"lacks 16 tensors of the backbone, first bert.encoder.layer.4"):
        DOOR.from_pretrained(plain, num_hidden_layers=5)


# --- another family -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
    RobertaForSequenceClassification(RobertaConfig(**SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(
        EarlyExitConfigError, match=r"model_type is 'roberta'; expected 'bert' or 'early_exit_bert'"
    ) as caught:
        DOOR.from_pretrained(tmp_path)
    assert caught.value.path == str(tmp_path)


@pytest.mark.parametrize("model_type", [None, "bert"])
def test_weights_of_another_family_are_refused_whatever_the_config_says(plain, tmp_path, model_type):
    folder = edited(plain, tmp_path / "m", model_type=model_type)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("bert.", "roberta.", 1): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks \d+ tensors of the backbone, first bert.embeddings"):
        DOOR.from_pretrained(folder)


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_checkpoints_without_a_head_or_a_pooler_still_load(tmp_path, kind):
    kind(BertConfig(**SHAPE)).save_pretrained(tmp_path)
    model = DOOR.from_pretrained(tmp_path, num_labels=3)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point())
