"""Copies of a model whose layers compute in another number format: what all of them have in common."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..modeling.protocol import TorchExitClassifier, Wrapped
from ..modeling.wrapped import unwrapped_without_adapters
from .served import form_of


def copied(model: Wrapped, form: str) -> Any:
    """A copy without policy, operating points and promises, in evaluation mode, that cannot be saved.

    Args:
        model: a float32 classifier with exits. It is not changed.
        form: name of the copy's form, which its answers tell.

    Raises:
        UsageError: for a model of another precision, or with adapters that are not merged.
    """
    inner: Any = unwrapped_without_adapters(model, form)
    if form_of(inner) != "fp32":
        raise UsageError(
            f"The model is {form_of(inner)} on {inner.device}; {form} needs float32: "
            "take the model it was made from, or call model.float() first.",
            field="model",
        )
    new = copy.deepcopy(inner).eval().requires_grad_(False)
    new.set_exit_policy(None)
    new.set_operating_points(None)
    new.config.exit_forms = None
    new.form = form
    new.save_pretrained = partial(_cannot_save, form)
    new.pads = False
    return new


def replace_maps(model: TorchExitClassifier, make: Callable[..., nn.Module]) -> None:
    """Put other maps in the place of the layers' linear maps.

    Args:
        model: from `copied`; it is changed.
        make: linear maps of one input to the map that takes their place, with their outputs side by side.
    """
    for layer in layers_of(model):
        if model.family.same_input is not None:
            path, names = model.family.same_input
            part = layer.get_submodule(path)
            part.joint = make(*(getattr(part, name) for name in names))
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if (linear := _as_linear(child)) is not None:
                    setattr(parent, name, make(linear))
    model.eval()  # new modules begin in training


def layers_of(model: TorchExitClassifier) -> list[nn.Module]:
    """The layers of a model, each once though it may come more than once."""
    return list(dict.fromkeys(model.family.layers_of(model.base_model)))


def joint_weight(linears: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor]:
    """Weight `[out, in]` and bias `[out]` of linear maps of one input, side by side; bias 0 where there is none."""
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    biases = [x.weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
    return weight, torch.cat(biases).float()


def checksum(*tensors: Tensor) -> Tensor:
    """SHA-256 of these tensors' values, `[32]` bytes: a buffer of it makes packed weights part of a model's fingerprint."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _as_linear(module: nn.Module) -> nn.Linear | None:
    """A linear map as torch writes it, whoever wrote it; `None` for other modules."""
    if isinstance(module, nn.Linear):
        return module
    if not isinstance(module, Conv1D):
        return None
    linear = nn.Linear(*module.weight.shape)
    linear.weight, linear.bias = nn.Parameter(module.weight.detach().T.contiguous(), False), module.bias
    return linear


def _cannot_save(form: str, *args: Any, **kwargs: Any) -> None:
    raise UsageError(
        f"A copy in {form} cannot be saved: save the model it was made from, and make the copy again after loading.",
        field="model",
    )
