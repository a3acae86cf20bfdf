"""Settings of transformers' Trainer that models with exits cannot use, refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from ..generation.token_exits import ModelThatWrites
from ..losses import Objective
from ..modeling.protocol import TorchExitModel
from ..problem_types import SINGLE_LABEL
from ..registry import unknown_name

if TYPE_CHECKING:
    from .arguments import EarlyExitTrainingArguments

KEPT = frozenset({"loss", "logits", "exit_logits", "exit_gates"})  # outputs that evaluations look at


def check_arguments(given: Mapping[str, Any], cls: type, why_not: Mapping[str, str]) -> None:
    """Refuse arguments beyond those that a trainer names.

    Args:
        given: what else was passed; `None` stands for what was left out.
        cls: the trainer, for the names that it takes.
        why_not: arguments of transformers' `Trainer` that it cannot use, and why.

    Raises:
        TrainingError: for one of `why_not`.
        UnknownNameError: for a name that means nothing, with the nearest that does.
    """
    for name, value in given.items():
        if name not in why_not:
            known = {name for name, part in signature(cls).parameters.items() if part.kind != part.VAR_KEYWORD}
            raise unknown_name(f"argument of {cls.__name__}", name, known)
        if value not in (None, (None, None)):
            raise refused(name, None, why_not[name])


def check_settings(args: EarlyExitTrainingArguments, objective: Objective, model: TorchExitModel) -> None:
    """Refuse training arguments that would do nothing, or harm, to this model.

    Raises:
        TrainingError: naming the argument.
    """
    if args.use_liger_kernel:
        raise refused("use_liger_kernel", True, "Liger's kernels take the place of whole forward passes, exits included")
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise split_error(name)
    for size in ("cp_size", "sp_size"):
        if (getattr(args.parallelism_config, size, None) or 1) > 1:
            raise refused(
                f"parallelism_config.{size}",
                getattr(args.parallelism_config, size),
                "exits pool over whole sequences, which it cuts into parts",
            )
    if objective.writers_only and not isinstance(model, ModelThatWrites):
        raise refused("objective", args.objective, "it is for models that write, and this one classifies")
    if objective.drop_chances(1) is not None and args.n_gpu > 1:
        raise refused(
            "objective", args.objective, "it drops layers row by row, and DataParallel cuts batches; start one process a GPU"
        )
    if args.neftune_noise_alpha is not None and objective.freezes_backbone:
        raise refused(
            "neftune_noise_alpha",
            args.neftune_noise_alpha,
            f"the {args.objective} objective freezes the embeddings that the noise would go to",
        )
    if len(args.label_names or ()) > 1:
        raise refused("label_names", args.label_names, "one column holds the labels; name that one")
    problem_type = getattr(model.config, "problem_type", None)
    if args.label_smoothing_factor and problem_type not in (None, SINGLE_LABEL):
        raise smoothing_error(problem_type)


def check_ignored(field: str, keys: Iterable[str] | None) -> None:
    """Refuse to leave outputs out that evaluations are made of; hidden states and the like are never kept.

    Raises:
        TrainingError: naming the argument and the outputs.
    """
    if dropped := sorted(KEPT.intersection(keys or ())):
        raise refused(field, dropped, "the figures of every exit are made of them")


def check_loss_func(args: EarlyExitTrainingArguments) -> None:
    """Refuse `compute_loss_func` beside what it would overrule.

    Raises:
        TrainingError: naming both.
    """
    if args.label_smoothing_factor:
        raise refused(
            "label_smoothing_factor", args.label_smoothing_factor, "compute_loss_func takes the place of the loss it smooths"
        )


def split_error(name: str) -> TrainingError:
    """The error for "fsdp" or "deepspeed", whether asked for in the arguments or by `accelerate launch`."""
    return refused(name, None, "it splits the model over devices, which models with exits do not support")


def smoothing_error(problem_type: str) -> TrainingError:
    """The error for smoothed labels that are no classes."""
    return refused("label_smoothing_factor", None, f"it smooths class labels, and problem_type is {problem_type}")


def refused(field: str, value: Any, why: str) -> TrainingError:
    """The error for a setting that cannot be used."""
    shown = field if value is None else f"{field}={value!r}"
    return TrainingError(f"{shown} cannot be used here: {why}. Leave it out.", field=field, value=value)


def given_losses(
    compute: Callable[..., Tensor],
    outputs: Any,
    num_items: Any,
    scale: float,
    exit_logits: Tensor,
    labels: Tensor,
    problem_type: str,
) -> Tensor:
    """The user's loss of every exit, `[E]`.

    Args:
        compute: `compute_loss_func`.
        outputs: of the model; given to it with one exit's logits in place of the last's.
        num_items: labels in the whole accumulated batch, or `None`.
        scale: factor of what it gives.
        exit_logits: `[B, E, C]`, float32.
        labels, problem_type: as in `Objective.exit_losses`.

    Raises:
        TrainingError: for what is not one number.
    """
    losses = []
    for logits in exit_logits.unbind(1):
        loss = compute(type(outputs)(**{**outputs, "logits": logits}), labels, num_items_in_batch=num_items)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            result = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise TrainingError(
                f"compute_loss_func gave {result}; expected a tensor of one number, the loss of the batch.",
                field="compute_loss_func",
            )
        losses.append(loss.reshape(()) * scale)
    return torch.stack(losses)


def has_adapters(model: TorchExitModel | nn.Module) -> bool:
    """Whether PEFT has put adapters or trained copies into a model."""
    return hasattr(model, "peft_config") or any(hasattr(module, "modules_to_save") for module in model.modules())


def check_adapters(model: TorchExitModel | nn.Module, exit_model: TorchExitModel) -> None:
    """Refuse a PEFT model in which parts of the exits are frozen: they would stay as they were drawn.

    Args:
        model: as it was given.
        exit_model: what is inside.

    Raises:
        TrainingError: naming the parts.
    """
    if model is exit_model or not has_adapters(exit_model):
        return
    frozen = [
        f"exit_heads.{layer}.{name}"
        for layer, head in exit_model.exit_heads.items()
        for name, part in head.named_children()
        if any(True for _ in part.parameters()) and not any(p.requires_grad for p in part.parameters())
    ]
    if frozen:
        raise TrainingError(
            f"PEFT has frozen {', '.join(frozen)}: the exits would not learn. Pass "
            f"modules_to_save={['classifier', *frozen]!r} to the PEFT config.",
            field="exit_heads",
        )
