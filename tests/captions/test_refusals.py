"""What a captioner refuses, and in what words."""

import pytest
import torch
from transformers import (
    AutoConfig,
    ConvNextConfig,
    Dinov2Config,
    GPT2Config,
    OPTConfig,
    ResNetConfig,
    SwinConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

import hf_earlyexit as ee
from hf_earlyexit.errors import CheckpointError, DataError, EarlyExitConfigError, UsageError
from tests.captions.conftest import ENCODER, decoder_config


def config(**fields):
    return ee.EarlyExitVisionEncoderDecoderConfig(
        **{"encoder": ViTConfig(**ENCODER), "decoder": decoder_config("gpt2"), **fields}
    )


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(0, 3, 16, 16), "holds no image"),
        (torch.zeros(2, 1, 16, 16), "1 channels; the encoder takes 3"),
        (torch.zeros(2, 3, 20, 16), "20 x 16; the encoder takes 16 x 16"),
        (torch.zeros(3, 16, 16), r"\[3, 16, 16\] torch.float32; expected floats"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "torch.uint8; expected floats"),
        ("photo.jpg", "str; expected floats"),
        (None, "No images"),
    ],
)
def test_images_that_are_none(captioner, pixels, words):
    with pytest.raises(DataError, match=words):
        captioner().generate(pixels, max_new_tokens=3)


def test_images_on_another_device(captioner):
    with pytest.raises(DataError, match="on meta, the model on cpu"):
        captioner().generate(torch.zeros(1, 3, 16, 16, device="meta"))


@pytest.mark.parametrize(
    ("token", "words"), [("decoder_start_token_id", "No start token"), ("pad_token_id", "No padding token")]
)
def test_tokens_nobody_set(captioner, images, token, words):
    model = captioner()
    model.generation_config.bos_token_id = None
    setattr(model.generation_config, token, None)
    with pytest.raises(DataError, match=words):
        model.generate(images(1), max_new_tokens=3)


def test_early_exit_without_policy_in_training_or_without_cache(captioner, images, mixed):
    model = captioner()
    with pytest.raises(UsageError, match="no policy is set"):
        model.generate(images(1), early_exit=True)
    model.set_exit_policy(mixed(model, "confidence"))
    with pytest.raises(UsageError, match="leave use_cache out"):
        model.generate(images(1), use_cache=False)
    with pytest.raises(UsageError, match="output_hidden_states"):
        model.generate(images(1), output_hidden_states=True)
    with pytest.raises(UsageError, match="assistant"):
        model.generate(images(1), prompt_lookup_num_tokens=2)
    with pytest.raises(UsageError, match="one by one over a cache"):
        model(images(1), decoder_input_ids=torch.tensor([[1, 5]]), early_exit=True)
    with pytest.raises(UsageError, match=r"model\.eval"):
        model.train().generate(images(1), early_exit=True)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exit_layers": [1, 5]}, "exit_layers is .*from 1 to 4"),
        ({"exit_signal": "shortlist"}, "exit_shortlist is None"),
        ({"exit_signal": "words"}, "one of vocabulary, shortlist"),
        ({"exit_shortlist": 51}, "from 2 to 50"),
        ({"exit_rank": 0}, "exit_rank is 0"),
        ({"exit_gate": "mlp+logits"}, "no logits are needed"),
        ({"exit_decay": -1.0}, "exit_decay is -1"),
        ({"decoder": GPT2Config(vocab_size=50, n_layer=4)}, "add_cross_attention is False"),
        ({"encoder": ViTConfig(**{**ENCODER, "num_hidden_layers": 0})}, "encoder.num_hidden_layers is 0"),
        ({"encoder": ViTConfig(**{**ENCODER, "num_hidden_layers": 10**9})}, "encoder.num_hidden_layers is 1000000000"),
        ({"encoder": ConvNextConfig()}, "encoder.model_type is 'convnext'.*with a hidden_size"),
        ({"encoder": ResNetConfig()}, "encoder.model_type is 'resnet'.*with a hidden_size"),
        ({"decoder": OPTConfig(num_hidden_layers=2)}, "'opt'; decoders that can exit early are gpt2, bert"),
        ({"exit_policy": {"name": "gate", "thresholds": [0.5] * 3}}, "the gate policy reads them"),
        ({"exit_policy": {"name": "confidence", "thresholds": [0.5] * 2}}, "3 thresholds"),
    ],
)
def test_configurations_that_cannot_work(fields, words):
    with pytest.raises(EarlyExitConfigError, match=words):
        config(**fields)


def test_exits_that_are_missing_or_cut_are_refused(captioner, tmp_path):
    captioner(exit_head="linear").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="surplus"):
        ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path, exit_head="tied")
    with pytest.raises(CheckpointError, match="missing"):
        ee.EarlyExitVisionEncoderDecoder.from_pretrained(tmp_path, exit_gate="linear")


ANY_SIZE = {
    "dinov2": Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8),
    "swin": SwinConfig(embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=2, image_size=32, patch_size=4),
}


@pytest.mark.parametrize("kind", ANY_SIZE)
def test_encoders_that_take_any_size_get_any_size(kind):
    torch.manual_seed(0)
    fields = config(encoder=ANY_SIZE[kind])
    model = ee.EarlyExitVisionEncoderDecoder(fields).eval()
    model.generation_config.update(decoder_start_token_id=1, eos_token_id=2, pad_token_id=0)
    assert model.generate(torch.randn(2, 3, 16, 16), max_new_tokens=3).shape == (2, 4)
    assert model(torch.randn(2, 3, 24, 16), decoder_input_ids=torch.ones(2, 3, dtype=torch.long)).logits.isfinite().all()


@pytest.mark.parametrize("head", ["tied", "tuned", "linear", "low-rank"])
@pytest.mark.parametrize("words", [57, 40])
def test_word_heads_are_resized_with_the_decoder(captioner, images, mixed, head, words):
    model = captioner(exit_head=head, exit_rank=8, exit_shortlist=45)
    ids = torch.randint(3, 40, (2, 5), generator=torch.Generator().manual_seed(0))
    before = model(images(2), labels=ids, early_exit=False).exit_logits
    model.resize_token_embeddings(words, mean_resizing=False)
    after = model(images(2), labels=ids, early_exit=False).exit_logits
    assert after.shape[-1] == words
    assert torch.allclose(after[..., :40], before[..., :40], atol=1e-5)
    assert model.config.exit_shortlist == len(model.exit_shortlist) == min(45, words)
    model.set_exit_policy(ee.policies.SaturationPolicy(thresholds=[0.0] * 3))
    output = model.generate(images(2), max_new_tokens=4, output_logits=True, return_exit_layers=True)
    assert [part.shape[-1] for part in output.logits] == [words] * len(output.logits)
    assert (output.exit_layers[:, 2] <= 1).all()


@pytest.mark.parametrize("head", ["linear", "low-rank"])
def test_a_decoder_resized_without_its_exits_is_refused(captioner, images, head):
    model = captioner(exit_head=head, exit_rank=8)
    model.decoder.resize_token_embeddings(57, mean_resizing=False)
    model.set_exit_policy(ee.policies.SaturationPolicy(thresholds=[0.0] * 3))
    with pytest.raises(UsageError, match="know 50 words, the decoder 57"):
        model.generate(images(2), max_new_tokens=4)
    with pytest.raises(UsageError, match="know 50 words, the decoder 57"):
        model(images(2), labels=torch.ones(2, 3, dtype=torch.long), early_exit=False)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_plain_config_may_be_handed_over(stock_folder, images, kind):
    folder = stock_folder(kind)
    model = ee.EarlyExitVisionEncoderDecoder.from_pretrained(folder, config=AutoConfig.from_pretrained(folder)).eval()
    stock = VisionEncoderDecoderModel.from_pretrained(folder).eval()
    assert model.exit_layers == (1, 2, 3, 4)
    assert torch.equal(model.generate(images(2), max_new_tokens=4), stock.generate(images(2), max_new_tokens=4))
