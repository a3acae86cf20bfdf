"""What a model gives back."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, Seq2SeqLMOutput
from transformers.utils.generic import ModelOutput


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
