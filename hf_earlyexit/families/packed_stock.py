"""Stock layers over rows that stand end to end: views of them that ask for attention row by row."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..transfer import placed
from .base import LAST, Family, Frame, is_watched, last_token
from .context import Context
from .packed import Packed, pack

ATTENTION = "hf_earlyexit_packed"


def begin_packed(family: Family, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Packed, Tensor | None]:
    """Hidden states `[tokens, H]`, the bounds of the rows, and each token's position `[1, tokens]` where layers ask.

    Everything is looked at where the inputs are, and only real tokens go from there to the model's device.
    """
    family.check(family, model, inputs)
    given = {name: inputs[name] for name in family.inputs if inputs.get(name) is not None}
    mask = given.pop("attention_mask", None)
    ids = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
    shape = ids.shape[:2]
    answering = last_token(model.config, {**given, "attention_mask": mask}) if family.token == LAST else None
    tokens, context = pack(shape, mask, model.device, answering, front=family.token != LAST)
    if tokens is None and not family.keeps_positions and "position_ids" not in given:  # as the stock model does it
        given = {name: placed(values, model.device) for name, values in given.items()}
        hidden = family.embed(model, {**dict.fromkeys(family.inputs), **given})
        return hidden.flatten(0, 1), context, None
    if "position_ids" not in given:
        counted = None if family.positions is None else family.positions(model, given)
        counted = torch.arange(shape[1], device=ids.device)[None] if counted is None else counted
        given["position_ids"] = counted
    flat = {name: values.expand(*shape, *values.shape[2:]).flatten(0, 1) for name, values in given.items()}
    flat = {name: values if tokens is None else values[tokens] for name, values in flat.items()}
    flat = {name: placed(values, model.device)[None] for name, values in flat.items()}
    return family.embed(model, {**dict.fromkeys(family.inputs), **flat})[0], context, flat["position_ids"]


class PackedView:
    """A stock layer for packed rows: a view of it, which shares all parameters and computes attention row by row.

    For every layer that asks transformers' attention interface, with whatever masks and rotary embeddings it takes.

    Args:
        family: of the layer.
        layer: the stock layer.
    """

    frames: ClassVar[bool] = True

    def __init__(self, family: Family, layer: nn.Module) -> None:
        self.call, self.layer = family.call, _view(layer)

    def __call__(self, hidden: Tensor, context: Packed) -> Tensor:
        """Hidden states after the layer, `[tokens, H]`."""
        return self.call(self.layer, hidden[None], context)[0]

    @staticmethod
    def begin(family: Family, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Context]:
        """Hidden states `[tokens, H]` and their context."""
        hidden, context, positions = begin_packed(family, model, inputs)
        framed = family.frame(Frame(model, hidden[None], None, positions, packed=context))
        return hidden, replace(context, per_row=framed.per_row, shared=framed.shared, axes=framed.axes)

    @staticmethod
    def fits(layer: nn.Module) -> bool:
        """Whether a layer is the stock one, in evaluation, and nobody watches its parts."""
        return is_stock(layer) and not is_watched(layer.modules())


def is_stock(*modules: Any) -> bool:
    """Whether modules do what transformers' classes say, and do not train."""
    return all(type(module).__module__.startswith("transformers.models.") and not module.training for module in modules)


def _view(module: nn.Module) -> nn.Module:
    """A copy of a tree of modules that shares everything but asks `ATTENTION`."""
    children = module._modules
    config = module.__dict__.get("config")
    if not children and config is None:
        return module
    new = object.__new__(type(module))
    new.__dict__.update(module.__dict__)
    new.__dict__["_modules"] = {name: None if child is None else _view(child) for name, child in children.items()}
    if config is not None:
        config = copy.copy(config)
        config._attn_implementation_internal = ATTENTION
        new.__dict__["config"] = config
    return new


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Packed,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface over packed rows: `[1, heads, tokens, D]` to `[1, tokens, heads, D]`."""
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    window = kwargs.get("sliding_window") or getattr(module, "sliding_window", None)
    mixed = attention_mask.attend(q, k, v, scaling, getattr(module, "is_causal", False), window)
    return mixed.view(1, len(q), *q.shape[1:]), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
