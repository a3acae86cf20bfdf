"""A tiny captioner, its tokenizer and image processor, and pictures, made alike in every process."""

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, ViTConfig, ViTImageProcessorPil

import hf_earlyexit as ee
from tests.captions.conftest import ENCODER, END, LAYERS, PAD, START, WORDS, decoder_config

VOCABULARY = [
    "[PAD]",
    "[CLS]",
    "[SEP]",
    "[UNK]",
    "[MASK]",
    *(f"w{n}" for n in range(5, 35)),
    *(f"##x{n}" for n in range(15)),
]
assert len(VOCABULARY) == WORDS


def make_tokenizer():
    return BertTokenizer(vocab={word: number for number, word in enumerate(VOCABULARY)}, model_max_length=40)


def make_image_processor():
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def make_pictures(count=6, seed=0):
    """Noise of several sizes."""
    draw = np.random.default_rng(seed)
    sizes = [(20 + 3 * row, 30 - row, 3) for row in range(count)]
    return [Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


def make_captioner(kind="gpt2", seed=0, **fields):
    """With heads of its own and the operating points "fast" and "careful"; the latter serves by default."""
    torch.manual_seed(seed)
    config = ee.EarlyExitVisionEncoderDecoderConfig(
        encoder=ViTConfig(**ENCODER), decoder=decoder_config(kind), **{"exit_head": "linear", **fields}
    )
    model = ee.EarlyExitVisionEncoderDecoder(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("exit_heads.") and "norm" not in name:
                weight.normal_(0, 0.1 if weight.ndim == 1 else 0.5)
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = START, PAD, END
    model.generation_config.max_new_tokens = 12
    model.set_operating_points({"fast": policy(model, 0.7), "careful": policy(model, 0.3)}, default="careful")
    return model


def policy(model, share):
    """Confidence thresholds that let about `share` of random tokens leave at each exit."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, WORDS, (20, 12), generator=generator)
    with torch.no_grad():
        output = model(torch.randn(20, 3, 16, 16, generator=generator), labels=ids, early_exit=False)
    sure = output.exit_logits.softmax(-1).amax(-1).flatten(0, 1)[:, : LAYERS - 1]
    return ee.ConfidencePolicy(thresholds=sure.quantile(1 - share, dim=0).tolist())


def save_all(folder, **fields):
    """The captioner's folder, as `ee.save` writes it; returns the model."""
    model = make_captioner(**fields)
    ee.save(model, folder, tokenizer=make_tokenizer(), image_processor=make_image_processor())
    return model


def essence(captions):
    """Text and exit layers of a pipeline's answers."""
    return [[one["generated_text"], one["exit_layers"]] for one in captions]
