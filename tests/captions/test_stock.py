"""A captioner that runs in full is the stock captioner."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
    ViTModel,
)

import hf_earlyexit as ee
from tests.captions.conftest import ENCODER, END, PAD, START, decoder_config

MODES = {"greedy": {}, "beams": {"num_beams": 3}, "sampling": {"do_sample": True, "top_k": 20}}
KINDS = ["gpt2", "bert"]


def generated(model, images, **options):
    torch.manual_seed(7)
    return model.generate(images, max_new_tokens=15, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_closed_exits_give_the_stock_ids(stock_folder, captioner, images, mixed, kind, attention, mode):
    stock = VisionEncoderDecoderModel.from_pretrained(stock_folder(kind), attn_implementation=attention).eval()
    expected = generated(stock, images(4), **MODES[mode])
    assert len(set(map(tuple, expected.tolist()))) == 4
    model = captioner(kind, attention=attention)
    assert torch.equal(generated(model, images(4), **MODES[mode]), expected)
    closed = mixed(model, "confidence").with_thresholds((None,) * 3)
    model.set_exit_policy(closed)
    output = generated(model, images(4), return_exit_layers=True, **MODES[mode])
    assert torch.equal(output.sequences, expected)
    assert set(output.exit_layers.unique().tolist()) <= {0, 4}
    model.set_exit_policy(mixed(model, "confidence"))
    assert not torch.equal(generated(model, images(4), **MODES[mode]), expected), "open exits must change something here"
    assert torch.equal(generated(model, images(4), early_exit=False, **MODES[mode]), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_an_ordinary_checkpoint_keeps_every_weight(stock_folder, kind):
    stock = VisionEncoderDecoderModel.from_pretrained(stock_folder(kind))
    model, info = ee.EarlyExitVisionEncoderDecoder.from_pretrained(stock_folder(kind), output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"], "tied exits are nothing new"
    own = model.state_dict()
    assert all(torch.equal(own[name], weight) for name, weight in stock.state_dict().items())


def test_only_the_exits_are_new(captioner, stock_folder):
    _, info = ee.EarlyExitVisionEncoderDecoder.from_pretrained(
        stock_folder("gpt2"), exit_head="low-rank", exit_rank=8, exit_gate="mlp", output_loading_info=True
    )
    assert info["missing_keys"]
    assert all(name.startswith(("exit_heads.", "exit_gates.")) for name in info["missing_keys"])


def test_new_tuned_heads_say_what_tied_heads_say(captioner, images, stock_folder):
    tuned = ee.EarlyExitVisionEncoderDecoder.from_pretrained(stock_folder("gpt2"), exit_head="tuned").eval()
    labels = torch.tensor([[5, 6, 7, END]])
    with torch.no_grad():
        said = tuned(images(1), labels=labels, early_exit=False).exit_logits
        tied = captioner()(images(1), labels=labels, early_exit=False).exit_logits
    torch.testing.assert_close(said, tied)


def test_from_encoder_decoder_pretrained_is_the_stock_way(tmp_path, images):
    torch.manual_seed(0)
    ViTModel(AutoConfig.for_model("vit", **ENCODER), add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    GPT2LMHeadModel(decoder_config("gpt2")).save_pretrained(tmp_path / "decoder")
    made = []
    for cls in (VisionEncoderDecoderModel, ee.EarlyExitVisionEncoderDecoder):
        torch.manual_seed(0)
        model = cls.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
        settings = model.generation_config
        settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = START, PAD, END
        made.append(model)
    stock, model = made
    assert type(model.config) is ee.EarlyExitVisionEncoderDecoderConfig
    model.enc_to_dec_proj.load_state_dict(stock.enc_to_dec_proj.state_dict())
    assert torch.equal(generated(model, images(3)), generated(stock, images(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_by_both_auto_classes_and_by_the_stock_class(captioner, images, mixed, tmp_path, kind):
    model = captioner(kind, exit_head="linear", exit_gate="linear", exit_layers=[1, 3, 4])
    model.set_operating_points({"quick": mixed(model, "confidence")}, default="quick")
    model.save_pretrained(tmp_path)
    expected = generated(model, images(4), return_exit_layers=True)
    assert len(expected.exit_layers.unique()) > 2
    for auto in (AutoModel, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is ee.EarlyExitVisionEncoderDecoder
        again = generated(loaded, images(4), return_exit_layers=True, operating_point="quick")
        assert torch.equal(again.sequences, expected.sequences)
        assert torch.equal(again.exit_layers, expected.exit_layers)
    stock = VisionEncoderDecoderModel.from_pretrained(tmp_path)
    assert torch.equal(generated(stock, images(4)), generated(model, images(4), operating_point="exact"))


def test_a_full_pass_tells_every_exit_and_is_the_stock_pass(captioner, stock_folder, images):
    model = captioner(exit_gate="mlp", exit_head="linear")
    stock = VisionEncoderDecoderModel.from_pretrained(stock_folder("gpt2")).eval()
    labels = torch.tensor([[5, 6, END], [9, END, -100]])
    with torch.no_grad():
        expected = stock(images(2), labels=labels, output_hidden_states=True)
        output = model(images(2), labels=labels, early_exit=False)
        plain = model(images(2), labels=labels)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.loss, expected.loss)
    assert output.exit_logits.shape == (2, 3, 4, 50)
    assert torch.equal(output.exit_logits[:, :, -1], expected.logits)
    assert torch.equal(output.exit_logits[:, :, 1], model.exit_logits(1, expected.decoder_hidden_states[2]))
    assert output.exit_scalars["gate"].shape == (2, 3, 3)
    assert output.decoder_hidden_states is None
    assert plain.exit_logits is None
    assert torch.equal(plain.logits, expected.logits)


def test_training_teaches_every_exit_and_gate_free_parameters_get_gradients(captioner, images):
    model = captioner(exit_head="low-rank", exit_rank=4).train()
    model(images(2), labels=torch.tensor([[5, 6, END], [9, END, -100]])).loss.backward()
    without = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().sum()]
    assert not [name for name in without if name.startswith(("exit_heads.", "decoder.transformer.h."))]
