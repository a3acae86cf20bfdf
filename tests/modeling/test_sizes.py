"""Settings that no model can have are refused by name within a second, before anything is allocated, by every road."""

import json
import time

import pytest
import torch
from transformers import AutoConfig, AutoModel, GPT2Config, ViTConfig

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError, EarlyExitError
from tests.captions.conftest import ENCODER, decoder_config
from tests.hub.toy import make_model

ROADS = (
    ee.EarlyExitBertForSequenceClassification.from_pretrained,
    ee.EarlyExitBertConfig.from_pretrained,
    AutoConfig.from_pretrained,
    AutoModel.from_pretrained,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def written(folder):
    return (folder / "config.json").read_text()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 10**9) for name in ("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings")),
        *((name, 10**9) for name in ("num_labels", "num_hidden_layers", "num_attention_heads", "type_vocab_size")),
        *((name, 10**400) for name in ("hidden_size", "num_labels", "num_hidden_layers")),
        *((name, 0) for name in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")),
        *((name, -1) for name in ("hidden_size", "num_labels", "num_hidden_layers", "max_position_embeddings")),
        ("hidden_size", 999_999),
        ("intermediate_size", 4_000_000),
        ("vocab_size", 30_000_000),
        ("num_attention_heads", 5),
        ("pad_token_id", 10**6),
        ("hidden_dropout_prob", 2.0),
        ("attention_probs_dropout_prob", float("nan")),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", -1.0),
        ("initializer_range", -1.0),
        ("hidden_act", "gelo"),
        ("dtype", "load"),
        ("dtype", [1]),
        ("dtype", float("nan")),
        ("dtype", "float33"),
        ("id2label", {"x": "a"}),
        ("exit_cost", [1, 2, 3, 10**400]),
        ("exit_cost", [4, 3, 2, 1]),
        ("exit_cost", [-1, 2, 3, 4]),
    ],
)
def test_it_is_refused_by_name_at_once(folder, written, road, field, value):
    values = json.loads(written)
    if field == "num_labels":
        del values["id2label"], values["label2id"]
    (folder / "config.json").write_text(json.dumps({**values, field: value}))
    start = time.process_time()
    with pytest.raises(EarlyExitError) as caught:
        road(folder)
    assert time.process_time() - start < 1
    assert caught.value.path == str(folder)
    assert "config.json of" in str(caught.value)
    named = {"vocab_size": "hidden_size"}.get(field, field) if value in (30_000_000, 4_000_000) else field
    assert named in (caught.value.field or "") or field in str(caught.value)


def test_the_untouched_folder_loads(folder, written):
    (folder / "config.json").write_text(written)
    for road in ROADS:
        road(folder)


def test_sizes_that_the_weights_cannot_hold_are_refused_though_each_could_be(folder, written):
    (folder / "config.json").write_text(
        json.dumps({**json.loads(written), "hidden_size": 1 << 15, "intermediate_size": 1 << 15})
    )
    with pytest.raises(EarlyExitConfigError, match=r"sizes that fit the [\d,]+ bytes of weights beside it") as caught:
        AutoModel.from_pretrained(folder)
    assert caught.value.field == "hidden_size"


def test_a_size_that_the_weights_contradict_is_refused_tensor_by_tensor(folder, written):
    (folder / "config.json").write_text(json.dumps({**json.loads(written), "intermediate_size": 128}))
    with pytest.raises(CheckpointError, match="have another shape"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("encoder", "num_hidden_layers", 0),
        ("encoder", "num_hidden_layers", 10**9),
        ("encoder", "hidden_size", 10**9),
        ("encoder", "patch_size", 0),
        ("encoder", "patch_size", 64),
        ("encoder", "num_labels", 10**9),
        ("decoder", "n_layer", 0),
        ("decoder", "vocab_size", 10**9),
        ("decoder", "n_embd", 10**9),
        ("decoder", "n_head", 0),
        ("decoder", "resid_pdrop", 3.0),
        ("decoder", "activation_function", "gelo"),
    ],
)
def test_parts_of_captioners_are_looked_at(part, field, value, tmp_path):
    config = ee.EarlyExitVisionEncoderDecoderConfig(encoder=ViTConfig(**ENCODER), decoder=decoder_config("gpt2"))
    values = config.to_dict()
    values["decoder"]["add_cross_attention"] = True
    values[part][field] = value
    if field == "num_labels":
        values[part].pop("id2label"), values[part].pop("label2id")
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    start = time.process_time()
    with pytest.raises(EarlyExitError, match=rf"config\.json of .*{part}|num_hidden_layers"):
        AutoConfig.from_pretrained(tmp_path)
    assert time.process_time() - start < 1


def test_a_config_in_memory_is_checked_as_well():
    with pytest.raises(EarlyExitConfigError, match=r"encoder\.num_hidden_layers is 0; expected a whole number from 1"):
        ee.EarlyExitVisionEncoderDecoderConfig(
            encoder=ViTConfig(**{**ENCODER, "num_hidden_layers": 0}), decoder=GPT2Config(add_cross_attention=True)
        )
    with pytest.raises(EarlyExitConfigError, match="num_labels"):
        ee.EarlyExitBertConfig(num_labels=10**9)
    config = ee.EarlyExitBertConfig()
    config.hidden_act = "gelo"
    with torch.device("meta"), pytest.raises(EarlyExitError, match=r"Did you mean 'gelu'"):
        ee.EarlyExitBertForSequenceClassification(config)
