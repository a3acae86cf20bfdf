"""The model with exits inside what other libraries put around it."""

from __future__ import annotations

import sys
from typing import Any

from torch.nn import DataParallel, Module
from torch.nn.parallel import DistributedDataParallel

from ..errors import UsageError
from .operating import OperatingPoints
from .protocol import Wrapped


def unwrapped(model: Wrapped) -> Any:
    """The model with exits itself, without `torch.compile`, `DataParallel`, `DistributedDataParallel` or PEFT around it.

    Adapters that PEFT puts into the layers (LoRA and its kin) stay in them and answer. Compiled code is passed by, as layers
    are called one by one.

    Args:
        model: a model with exits, or one of these around it, in any order and number.

    Raises:
        UsageError: for anything else, and for adapters that only their own wrapper can run (prompts, routed adapters).
    """
    inner: Any = model
    while not isinstance(inner, OperatingPoints):
        if type(inner).__name__ == "OptimizedModule" and hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, (DataParallel, DistributedDataParallel)):
            inner = inner.module
        elif _is_peft(inner):
            inner = _without_peft(inner)
        else:
            names = dict.fromkeys(type(part).__name__ for part in (model, inner))
            raise UsageError(
                f"{' around '.join(names)} has no exits; expected a model with exits, as it is or within torch.compile, "
                "DataParallel, DistributedDataParallel or PEFT. Load one with ee.EarlyExitBertForSequenceClassification"
                ".from_pretrained(...), or take it out of what is around it.",
                field="model",
            )
    return inner


def unwrapped_without_adapters(model: Wrapped, purpose: str) -> Any:
    """As `unwrapped`, for what needs plain linear maps.

    Args:
        model: as in `unwrapped`.
        purpose: what the model is wanted for, for the error.

    Raises:
        UsageError: also for a model with adapters that are not merged.
    """
    inner = unwrapped(model)
    if isinstance(inner, Module) and _has_adapters(inner):
        raise UsageError(
            f"The model holds PEFT adapters beside its weights; {purpose} needs them merged: call "
            "model.merge_and_unload() and pass what it returns.",
            field="model",
        )
    return inner


def _is_peft(model: object) -> bool:
    peft = sys.modules.get("peft")  # whoever has such a model has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def _without_peft(model: Any) -> Any:
    config = model.active_peft_config
    if config.is_prompt_learning or str(getattr(config.peft_type, "value", config.peft_type)) in ("POLY", "XLORA"):
        raise UsageError(
            f"{type(model).__name__} with {type(config).__name__} changes the inputs or the way through the layers, which "
            "early exits do not know; expected adapters within the layers, such as LoRA.",
            field="model",
            value=type(config).__name__,
        )
    return model.get_base_model()


def _has_adapters(model: Module) -> bool:
    layers = sys.modules.get("peft.tuners.tuners_utils")
    kinds = () if layers is None else (layers.BaseTunerLayer, sys.modules["peft.utils.other"].AuxiliaryTrainingWrapper)
    return any(isinstance(module, kinds) for module in model.modules())
