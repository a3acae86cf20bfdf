"""A tiny model of every family: what its config needs beside a common shape."""

from functools import cache

import torch
import transformers

import hf_earlyexit as ee
from hf_earlyexit import doors
from hf_earlyexit.families import FAMILIES
from hf_earlyexit.families.base import IMAGE, LAST, TEXT
from hf_earlyexit.modeling.tasks import TASKS

VOCABULARY, PAD, WIDTH = 90, 1, 12
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 3}
WORDS = {**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": PAD}
PATCHES = {**SHAPE, "image_size": 16, "patch_size": 8}
MORE = {
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 48},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2, "num_hidden_layers": 4},
    "deberta-v2": {"relative_attention": True, "position_buckets": 8, "pos_att_type": "p2c|c2p", "share_att_key": True,
                   "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu", "position_biased_input": False},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "classifier_pooling": "mean"},
    "beit": {"use_relative_position_bias": True},
    "eurobert": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 40},
    "llama": {"num_key_value_heads": 1},
    "qwen2": {"num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
TEXTS = [name for name, family in FAMILIES.items() if family.task == TEXT]
IMAGES = [name for name, family in FAMILIES.items() if family.task == IMAGE]
PACKED = [name for name, family in FAMILIES.items() if family.packed is not None]
CAUSAL = [name for name, family in FAMILIES.items() if family.token == LAST]


def fields(name, **more):
    """Fields of a family's tiny config."""
    common = PATCHES if FAMILIES[name].task == IMAGE else WORDS
    renamed = {"distilbert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
               "gpt2": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
                        "max_position_embeddings")}.get(name, ())  # fmt: skip
    return {**{key: value for key, value in common.items() if key not in renamed}, **MORE.get(name, {}), **more}


def door(name):
    return getattr(ee, doors.door_of(name).model)


def stock_class(name):
    return getattr(transformers, f"{FAMILIES[name].name}{TASKS[FAMILIES[name].task].suffix}")


def new_model(name, seed=0, **more):
    """A seeded model in evaluation mode whose heads tell rows apart."""
    torch.manual_seed(seed)
    model = door(name)(door(name).config_class(**fields(name, **more))).eval()
    with torch.no_grad():
        for parameter, weight in model.named_parameters():
            if weight.ndim > 1 and not parameter.startswith("exit_gates"):
                weight.normal_(0, 1.0 if parameter.startswith(("exit_heads", "classifier", "score")) else 0.2)
    return model


tiny = cache(new_model)  # for tests that change nothing


def stock_of(model, name):
    """The stock model with the same weights."""
    config = stock_class(name).config_class(**fields(name))
    stock = stock_class(name)(config).eval()
    missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all(key.startswith(("exit_heads", "exit_gates")) for key in unexpected)
    stock.set_attn_implementation(model.config._attn_implementation)
    return stock


def batch_of(name, rows=6, seed=0, padding="right", **more):
    """Inputs of rows of several lengths, or images."""
    generator = torch.Generator().manual_seed(seed)
    if FAMILIES[name].task == IMAGE:
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(PAD + 1, VOCABULARY, (rows, WIDTH), generator=generator)
    lengths = torch.randint(2, WIDTH + 1, (rows,), generator=generator)
    lengths[0] = WIDTH
    if padding == "none":
        return {"input_ids": ids}
    places = torch.arange(WIDTH)
    real = places < lengths[:, None] if padding == "right" else places >= WIDTH - lengths[:, None]
    return {"input_ids": torch.where(real, ids, PAD), "attention_mask": real.long()}


def rows_of(batch, segments=False):
    """The rows of a batch padded on the right, as token ids, with segments as most tokenizers give them; or its images."""
    if "pixel_values" in batch:
        return [{"pixel_values": values} for values in batch["pixel_values"]]
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [{"input_ids": ids[:length].tolist()} for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    return [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows] if segments else rows
