"""Image encoders. Every image has the same number of patches, so rows are never padded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import IMAGE, Family, Frame, Framed
from .checks import FITTED, check_images, check_images_of_any_size, picture_of
from .context import Context, Part
from .masks import MASK, both_ways, framed, one_mask
from .text import call

IMAGE_INPUTS = ("pixel_values", FITTED)


def embed(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Patches, in the model's precision."""
    pixels = inputs["pixel_values"]
    options = {FITTED: True} if inputs.get(FITTED) else {}
    return model.embeddings(pixels.to(model.embeddings.patch_embeddings.projection.weight.dtype), **options)


def embed_any_size(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Patches of a model that always fits its positions to the image, in the model's precision."""
    pixels = inputs["pixel_values"]
    return model.embeddings(pixels.to(model.embeddings.patch_embeddings.projection.weight.dtype))


def _frame_beit(frame: Frame) -> Framed:
    model, (_, *side) = frame.model, picture_of(frame.model.config)
    mask = both_ways(frame)
    grid = tuple(length // model.config.patch_size for length in side)
    if torch.is_inference_mode_enabled():
        _keep_places(model, grid)
    if model.shared_position_bias is not None:
        bias = model.shared_position_bias(grid, interpolate_pos_encoding=False, dim_size=frame.hidden.shape[1])
        mask = bias if mask is None else bias + mask
    return framed(frame, {}, {MASK: mask, "resolution": tuple(side)})


def _keep_places(model: Any, grid: tuple[int, ...]) -> None:
    """Have transformers make its table of relative places as a plain tensor: it keeps it for passes that may learn."""
    biased = next((part for part in model.modules() if hasattr(part, "generate_relative_position_index")), None)
    if biased is not None:
        with torch.inference_mode(False):
            biased.generate_relative_position_index(grid)


def _call_beit(layer: nn.Module, hidden: Tensor, context: Context) -> Tensor:
    return layer(hidden, attention_mask=context[MASK], resolution=context["resolution"], **context.options)


def patches_answer(skipped: Any) -> Any:
    """The first token and the mean of the patches behind `skipped(config)` other tokens, side by side."""

    def answer(model: Any, part: Part) -> Tensor:
        patches = part.hidden[:, 1 + skipped(model.config) :]
        return model.classifier(torch.cat([part.hidden[:, 0], patches.mean(dim=1)], dim=1))

    return answer


VIT = Family(
    name="ViT",
    layers="layers",
    embed=embed,
    frame=one_mask,
    call=call,
    final_norm="layernorm",
    answer=lambda model, part: model.classifier(part.state),
    check=check_images,
    longest=lambda config: 0,
    dropout=("hidden_dropout_prob",),
    inputs=IMAGE_INPUTS,
    task=IMAGE,
)
DINOV2 = replace(
    VIT,
    name="Dinov2",
    check=check_images_of_any_size,
    layers="encoder.layer",
    embed=embed_any_size,
    answer=patches_answer(lambda config: 0),
    one_token=False,
    inputs=IMAGE_INPUTS[:1],
)
FAMILIES = {
    "vit": VIT,
    "deit": replace(VIT, name="DeiT"),
    "beit": replace(
        VIT,
        name="Beit",
        embed=embed_any_size,
        frame=_frame_beit,
        call=_call_beit,
        answer=lambda model, part: model.classifier(model.base_model.pooler(part.hidden)),
        one_token=False,
        inputs=IMAGE_INPUTS[:1],
    ),
    "dinov2": DINOV2,
    "dinov2_with_registers": replace(
        DINOV2,
        name="Dinov2WithRegisters",
        answer=patches_answer(lambda config: config.num_register_tokens),
    ),
}
