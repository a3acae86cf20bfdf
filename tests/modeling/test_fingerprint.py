"""What a fingerprint, and with it a certificate, is of: every weight and every setting that answers depend on."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, EarlyExitConfigError
from hf_earlyexit.modeling.fingerprint import (
    answering_settings,
    answering_state,
    model_fingerprint,
    short_sum,
    state_fingerprint,
)
from tests.captions.conftest import ENCODER, decoder_config
from tests.hub.toy import calibrate, make_model


def make_captioner(**fields):
    torch.manual_seed(0)
    parts = {"encoder": ViTConfig(**ENCODER), "decoder": decoder_config("gpt2")}
    return ee.EarlyExitVisionEncoderDecoder(ee.EarlyExitVisionEncoderDecoderConfig(**parts, **fields)).eval()


def changed(tensor):
    """One value of a tensor, by the least that its type can hold."""
    flat = tensor.view(-1)
    if not tensor.is_floating_point():
        flat[0] += 1
        return
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(torch.inf))


@pytest.mark.parametrize("head", ["linear", "pooler", "linear-cls", "linear-mean"])
@pytest.mark.parametrize("gate", [None, "mlp+logits"])
def test_every_module_of_a_classifier_counts(head, gate):
    model = make_model(exit_head=head, exit_gate=gate)
    state, config = answering_state(model), model.config
    before, seen = state_fingerprint(state, config), set()
    for name, tensor in state.items():
        kept = tensor.clone()
        changed(tensor)
        seen.add(state_fingerprint(state, config))
        assert before not in seen, name
        tensor.copy_(kept)
    assert len(seen) == len(state) == len(model.state_dict())  # each change has its own
    assert state_fingerprint(state, config) == before
    assert {name.rpartition(".")[0] for name in state} >= {"bert.pooler.dense", "classifier", "bert.embeddings.LayerNorm"}


@pytest.mark.parametrize("head", ["tied", "tuned", "linear", "low-rank"])
def test_every_module_of_a_captioner_counts(head):
    model = make_captioner(exit_head=head, exit_gate="linear", exit_shortlist=5)
    before = model_fingerprint(model)
    names = [name for name, tensor in model.state_dict().items() if tensor.numel()]
    assert {"exit_shortlist", "decoder.transformer.ln_f.weight", "decoder.lm_head.weight"} <= set(names)
    for name in names:
        tensor = model.state_dict()[name]
        kept = tensor.clone()
        changed(tensor)
        assert model_fingerprint(model) != before, name
        tensor.copy_(kept)
    assert model_fingerprint(model) == before


def test_the_order_of_the_tensors_does_not_matter_and_their_names_and_shapes_do():
    model = make_model()
    state, config = answering_state(model), model.config
    before = state_fingerprint(state, config)
    for names in (reversed(state), sorted(state, key=lambda name: name[::-1])):
        assert state_fingerprint({name: state[name] for name in names}, config) == before
    one, other = "bert.encoder.layer.0.output.dense.bias", "bert.encoder.layer.1.output.dense.bias"
    state[one].fill_(1.0)
    before = state_fingerprint(state, config)
    assert state_fingerprint({**state, one: state[other], other: state[one]}, config) != before
    assert state_fingerprint({**state, one: state[one].reshape(2, -1)}, config) != before
    assert state_fingerprint({name.replace(one, f"{one}s"): tensor for name, tensor in state.items()}, config) != before


def test_a_model_without_tensors_has_no_fingerprint():
    with pytest.raises(CheckpointError, match="no weights to take a fingerprint of"):
        state_fingerprint({}, make_model().config)


def test_a_compiled_model_has_the_fingerprint_of_the_model_inside():
    model = make_model()
    assert model_fingerprint(torch.compile(model, backend="eager")) == model_fingerprint(model)


def test_an_int8_copy_is_another_model_and_so_is_each_copy_of_another():
    model, other = make_model(), make_model()
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.mul_(-1)
    found = {model_fingerprint(one) for one in (model, ee.quantize_int8(model), ee.quantize_int8(other))}
    assert len(found) == 3
    assert model_fingerprint(ee.quantize_int8(model)) in found


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("hidden_act", "relu"),
        ("layer_norm_eps", 1e-5),
        ("num_attention_heads", 4),
        ("exit_head", "linear-cls"),
        ("type_vocab_size", 3),
        ("something_new", [1]),
    ],
)
def test_settings_that_change_answers_count(setting, value):
    model = make_model()
    before = model_fingerprint(model)
    setattr(model.config, setting, value)
    assert model_fingerprint(model) != before
    assert answering_settings(model.config)[setting] == value


def test_settings_that_change_no_answer_do_not():
    model = make_model()
    before = model_fingerprint(model)
    for name, value in {
        "hidden_dropout_prob": 0.3,
        "attention_probs_dropout_prob": 0.3,
        "classifier_dropout": 0.3,
        "initializer_range": 1.0,
        "use_cache": False,
        "output_hidden_states": True,
        "_name_or_path": "elsewhere",
        "architectures": ["X"],
        "id2label": {0: "bad", 1: "good", 2: "so so"},
        "exit_policy": ee.ConfidencePolicy(thresholds=[0.5] * 3).to_dict(),
        "exit_cost": [1.0, 2.0, 3.0, 4.5],
        "exit_tokenizer": "abc",
    }.items():
        setattr(model.config, name, value)
    assert model_fingerprint(model) == before


def test_settings_of_parts_count_by_their_place():
    model = make_captioner()
    before = answering_settings(model.config)
    model.config.decoder.scale_attn_weights = False
    model.config.encoder.layer_norm_eps = 0.5
    after = answering_settings(model.config)
    assert {name for name in after if after[name] != before.get(name)} == {
        "decoder.scale_attn_weights",
        "encoder.layer_norm_eps",
    }


@pytest.fixture
def saved(tmp_path):
    model = make_model()
    fast, slow = calibrate(model, [2.0, 1.2])
    model.set_operating_points({"fast": fast}, keep_others=True)
    model.set_exit_policy(slow)
    model.save_pretrained(tmp_path)
    return tmp_path


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.2.attention.self.query.weight",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "exit_heads.1.classifier.weight",
    ],
)
def test_a_folder_with_one_weight_changed_is_refused_with_both_fingerprints(saved, name):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    changed(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another model: its weights have the fingerprint \w{16}, and had \w{16}"):
        AutoModel.from_pretrained(saved)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("hidden_act", "relu", "hidden_act is 'relu', and was the default"),
        ("exit_head", "linear-cls", "exit_head is 'linear-cls', and was the default"),
        ("num_attention_heads", 4, "num_attention_heads is 4, and was 2"),
    ],
)
def test_a_folder_with_a_setting_changed_is_refused_by_the_settings_name(saved, setting, value, words):
    assert json.loads((saved / "config.json").read_text())[setting] != value
    edit_config(saved, **{setting: value})
    with pytest.raises(CheckpointError, match=words):
        AutoModel.from_pretrained(saved)
    assert AutoModel.from_pretrained(saved, ignore_certificate=True).exit_policy is None


@pytest.mark.parametrize("field", ["num_rows", "dtype", "policy", "target", "settings", "rounded"])
def test_a_certificate_that_was_edited_is_refused(saved, field):
    certificate = json.loads((saved / "config.json").read_text())["exit_certificate"]
    edit_config(saved, exit_certificate={**certificate, field: {} if isinstance(certificate[field], dict) else "x"})
    with pytest.raises(EarlyExitConfigError, match="expected a certificate as set_exit_policy writes it"):
        AutoModel.from_pretrained(saved)


def test_a_certificate_may_hold_more_than_this_library_knows(saved):
    certificate = json.loads((saved / "config.json").read_text())["exit_certificate"]
    more = {name: value for name, value in {**certificate, "risk": {"eps": 0.01}}.items() if name != "sum"}
    edit_config(saved, exit_certificate={**more, "sum": short_sum(more)})
    model = AutoModel.from_pretrained(saved)
    assert model.config.exit_certificate["risk"] == {"eps": 0.01}
    model.save_pretrained(saved)
    assert AutoModel.from_pretrained(saved).config.exit_certificate["risk"] == {"eps": 0.01}


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, ee.EarlyExitBertForSequenceClassification.from_pretrained])
def test_a_certificate_without_its_policy_is_refused(saved, load):
    edit_config(saved, exit_policy=None)
    with pytest.raises(EarlyExitConfigError, match="expected the policy that it vouches for") as caught:
        load(saved)
    assert (caught.value.field, caught.value.path) == ("exit_certificate", str(saved))
    assert load(saved, exit_certificate=None).exit_policy is None
    assert load(saved, exit_policy=None).config.exit_certificate is None


@pytest.mark.parametrize("points", [None, {}, {"slow": ee.ConfidencePolicy(thresholds=[0.5] * 3).to_dict()}])
def test_so_is_that_of_an_operating_point_that_is_gone(saved, points):
    edit_config(saved, exit_operating_points=points)
    with pytest.raises(EarlyExitConfigError, match="expected the policy that it vouches for") as caught:
        AutoModel.from_pretrained(saved)
    assert caught.value.field == "exit_point_certificates"


def test_a_policy_taken_off_by_hand_is_saved_without_its_certificate(saved):
    model = AutoModel.from_pretrained(saved)
    model.config.exit_policy = None
    model.save_pretrained(saved)
    assert AutoModel.from_pretrained(saved).config.exit_certificate is None


def test_weights_that_are_not_in_memory_cannot_be_certified_and_that_is_said(saved, caplog):
    from hf_earlyexit.modeling.certificate import check_certificates

    model = AutoModel.from_pretrained(saved)
    check_certificates(model.to("meta"), saved, drop_uncertified=False)
    assert any("are not in memory" in record.getMessage() for record in caplog.records)
