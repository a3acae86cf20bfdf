"""Tiny captioners whose tokens leave at different layers, and noise for images. No network."""

import pytest
import torch
from transformers import BertConfig, GPT2Config, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig

import hf_earlyexit as ee
from hf_earlyexit.signals.similarity import cosine

START, END, PAD, WORDS, LAYERS = 1, 2, 0, 50, 4
ENCODER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}


def decoder_config(kind):
    """The stock configuration of a decoder of 4 layers and width 32."""
    shared = {"vocab_size": WORDS, "is_decoder": True, "add_cross_attention": True, "initializer_range": 0.3}
    if kind == "gpt2":
        return GPT2Config(
            n_embd=32,
            n_layer=LAYERS,
            n_head=2,
            n_positions=40,
            bos_token_id=START,
            eos_token_id=END,
            pad_token_id=PAD,
            **shared,
        )
    return BertConfig(
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        pad_token_id=PAD,
        **shared,
    )


@pytest.fixture(scope="session")
def stock_folder(tmp_path_factory):
    """`stock_folder(kind)`: a folder with an ordinary captioner, decoder "gpt2" or "bert"."""
    made = {}

    def make(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = VisionEncoderDecoderConfig(
                encoder=ViTConfig(**ENCODER).to_dict(), decoder=decoder_config(kind).to_dict()
            )
            model = VisionEncoderDecoderModel(config)
            for settings in (model.config, model.generation_config):
                settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = START, PAD, END
            made[kind] = tmp_path_factory.mktemp("stock") / kind
            model.save_pretrained(made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="session")
def captioner(stock_folder):
    """`captioner(kind="gpt2", seed=0, attention="sdpa", **fields)`: the same with exits; heads and gates are random."""

    def make(kind="gpt2", seed=0, attention="sdpa", **fields):
        torch.manual_seed(seed)
        model = ee.EarlyExitVisionEncoderDecoder.from_pretrained(stock_folder(kind), attn_implementation=attention, **fields)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.startswith(("exit_heads.", "exit_gates.")) and "norm" not in name:
                    weight.normal_(0, 0.1 if weight.ndim == 1 else 0.5)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def images():
    """`images(rows, seed=0)`: noise `[rows, 3, 16, 16]`."""

    def make(rows, seed=0):
        return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def mixed(images):
    """`mixed(model, name, share=0.5)`: a policy of that name; each threshold lets `share` of some random tokens go."""

    def make(model, name, share=0.5):
        ids = torch.randint(3, WORDS, (20, 12), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            output = model(images(20, seed=9), labels=ids, early_exit=False, output_hidden_states=True)
        states = torch.stack(output.decoder_hidden_states, 2)  # [B, T, 1 + L, H]
        layers = torch.tensor(model.exit_layers)
        trace = ee.ExitTrace(
            logits=output.exit_logits.flatten(0, 1),
            labels=ids.flatten(),
            exit_layers=model.exit_layers,
            scalars={name: values.flatten(0, 1) for name, values in (output.exit_scalars or {}).items()}
            | {"similarity": cosine(states[:, :, layers - 1], states[:, :, layers]).flatten(0, 1)},
        )
        cls = ee.policies.POLICIES.get(name)
        if name == "static":
            return cls.at(1, len(model.exit_layers))
        policy = cls.from_trace(trace)
        levels = policy.scan(trace).scores[:, :-1].quantile(1 - share, dim=0)
        levels = levels.round() if cls.counts else levels
        return policy.with_thresholds(tuple(levels.clamp(policy.lowest_threshold, policy.highest_threshold).tolist()))

    return make
