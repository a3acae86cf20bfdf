"""What a model gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput

from ..walking.loop import Early


@dataclass
class EarlyExitClassifierOutput(ModelOutput):
    """Answers of a classifier with exits; what was not computed is `None`.

    Attributes:
        loss: scalar, where labels were given.
        logits: the answers `[B, C]`: each row's early answer, or the last exit's.
        exit_logits: every exit's logits `[B, E, C]`; only when all exits ran.
        exit_scalars: the signals that were asked for, by name `[B, E]`; only when all exits ran. `[B, E - 1]` of those that
            the last exit does not give, such as "gate", the gates' leave logits.
        exit_layer: the layer each row left after `[B]`, 1 to L.
        exit_score: the score each row left with `[B]`, float32; only with early exit. The last exit takes whoever is left.
        full_logits: the full model's answers to the shadowed rows `[n, C]`; only where rows were shadowed.
        hidden_states, attentions: as in the stock model; only when all exits ran.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_logits: Tensor | None = None
    exit_scalars: dict[str, Tensor] | None = None
    exit_layer: Tensor | None = None
    exit_score: Tensor | None = None
    full_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def early_output(early: Early, exit_layers: Sequence[int]) -> EarlyExitClassifierOutput:
    """The output of rows that left early.

    Args:
        early: what `run_early` gave.
        exit_layers: layers (1-based) of all exits.
    """
    layers = torch.tensor(exit_layers, device=early.exit_index.device)
    return EarlyExitClassifierOutput(
        logits=early.logits,
        exit_layer=layers[early.exit_index],
        exit_score=early.score,
        full_logits=early.full_logits if len(early.full_logits) else None,
    )


def full_output(
    exit_logits: Tensor, scalars: dict[str, Tensor], num_layers: int, shadowed: Sequence[int]
) -> EarlyExitClassifierOutput:
    """The output of a pass in which every exit ran.

    Args:
        exit_logits, scalars: what `run_all` gave.
        num_layers: L.
        shadowed: positions of the shadowed rows.
    """
    return EarlyExitClassifierOutput(
        logits=exit_logits[:, -1],
        exit_logits=exit_logits,
        exit_scalars=scalars or None,
        exit_layer=torch.full((len(exit_logits),), num_layers, device=exit_logits.device),
        full_logits=exit_logits[list(shadowed), -1] if len(shadowed) else None,
    )


@dataclass
class TokenExits:
    """What the exits of a model that writes say of its tokens; what was not computed is `None`.

    Attributes:
        exit_logits: every exit's logits of every token `[B, T, E, V]`; only when all exits ran.
        exit_scalars: learned signals by name, such as "gate", leave logits of every exit but the last `[B, T, E - 1]`; only
            when all exits ran.
        exit_layer: the layer each token left after `[B, T]`, 1 to L.
    """

    exit_logits: Tensor | None = None
    exit_scalars: dict[str, Tensor] | None = None
    exit_layer: Tensor | None = None


@dataclass
class EarlyExitCaptionerOutput(TokenExits, Seq2SeqLMOutput):
    """The stock output of a captioner, then `TokenExits`."""


@dataclass
class EarlyExitCausalLMOutput(TokenExits, CausalLMOutputWithCrossAttentions):
    """The stock output of a language model, then `TokenExits`."""
