"""What a policy's scores are along a captioner's own captions: enough to propose thresholds, little enough to keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput

from ..errors import CalibrationError
from ..generation.checks import check_generation, generation_settings
from ..generation.decoding import DecoderWalker, ExitRun, exit_layers_of
from ..policies.base import ExitPolicy
from ..problem_types import SINGLE_LABEL
from .batches import image_batches
from .checks import check_caption_tokens


class Captions(NamedTuple):
    """Captions of a batch of images: token ids `[B, S]`, the layer each left after `[B, S]` (0: prompt, padding)."""

    sequences: Tensor
    exit_layers: Tensor


class TokenTrace(NamedTuple):
    """Every exit on N tokens that may leave early, those of a full-depth caption after its first.

    Attributes:
        words: each exit's first word `[N, E]`; the last column is the full model's.
        scores: the policy's `[N, E]`, float32; -inf at muted exits, not to be read in the last column.
    """

    words: Tensor
    scores: Tensor

    @property
    def agrees(self) -> Tensor:
        """Whether each exit's word is the full model's, `[N, E]`, 0 or 1."""
        return (self.words == self.words[:, -1:]).float()


class TokenLessons:
    """What a policy may learn its own numbers from; stands in for an `ExitTrace`.

    Args:
        model: the captioner.
        trace: tokens to learn from, where the policy learns.

    Attributes:
        quality: whether each exit's word is the full model's `[N, E]`.
        scalars: names of the signals that the model gives.
    """

    problem_type = SINGLE_LABEL

    def __init__(self, model: Any, trace: TokenTrace | None = None) -> None:
        self.exit_layers = model.exit_layers
        self.num_exits = len(self.exit_layers)
        self.scalars: tuple[str, ...] = model.signals
        self._trace = trace

    @property
    def quality(self) -> Tensor:
        if self._trace is None:
            raise CalibrationError("This policy does not say that it learns (`learns = True`), yet reads rows.")
        return self._trace.agrees

    def _no_logits(self) -> NoReturn:
        raise CalibrationError(
            "This policy learns from the logits of many rows, one number per class; for a whole vocabulary that is too "
            "much to keep or to learn. Use beem-a, beem-c, confidence or margin, or pass a ready policy with its numbers.",
            field="policy",
        )

    @property
    def logits(self) -> NoReturn:
        self._no_logits()

    labels = logits


@torch.inference_mode()
def encoded_images(model: Any, rows: Any, image_processor: Any, batch_size: int) -> list[Tensor]:
    """The encoder's last states of all images, by batch, on the CPU: made once for many runs of the decoder."""
    states = []
    for batch in image_batches(rows, image_processor, batch_size):
        if "encoder_outputs" in batch:
            states.append(batch["encoder_outputs"][0])
        else:
            pixels = batch["pixel_values"].to(model.device, model.dtype)
            states.append(model.encoder(pixel_values=pixels).last_hidden_state.cpu())
    return states


def write_captions(model: Any, states: Tensor, policy: ExitPolicy | None, options: dict[str, Any]) -> Captions:
    """Captions of a batch as `generate` writes them with this policy; the model's own is not looked at.

    Args:
        model: the captioner, in evaluation mode.
        states: of the images, from `encoded_images`.
        policy: `None` for the full model.
        options: for `generate`.
    """
    run = ExitRun(policy)
    options = {**options, "return_dict_in_generate": True}
    settings = generation_settings(model, options)
    check_caption_tokens(settings, options)
    check_generation(settings, options, policy is not None and policy.may_leave, wants_layers=True)
    given = BaseModelOutput(last_hidden_state=states.to(model.device, model.dtype))
    output = GenerationMixin.generate(model, encoder_outputs=given, token_exits=run, **run.watching(options, settings))
    return Captions(output.sequences.cpu(), exit_layers_of(output, run).cpu())


def token_trace(model: Any, batches: Iterable[tuple[Tensor, Captions]], policy: ExitPolicy | None = None) -> TokenTrace:
    """Scores and first words of every exit along given captions, batch by batch.

    Each token is asked with the full-depth states of those before it. Serving differs once a token has left early, so what
    follows from a trace has to be confirmed by generation.

    Args:
        model: the captioner, in evaluation mode.
        batches: states of the images `[B, tokens, width]` and their full-depth captions.
        policy: whose scores; `None` for words alone, with scores 0.

    Raises:
        CalibrationError: if no caption has a token that may leave early.
    """
    parts = [_trace_batch(model, states, captions, policy) for states, captions in batches]
    trace = TokenTrace(torch.cat([part.words for part in parts]), torch.cat([part.scores for part in parts]))
    if not len(trace.words):
        raise CalibrationError(
            "No caption has a token that may leave early: the first runs in full, and all captions end there. Let "
            "generation go on (max_new_tokens), or train the model further.",
            field="rows",
        )
    return trace


@torch.inference_mode()
def _trace_batch(model: Any, states: Tensor, captions: Captions, policy: ExitPolicy | None) -> TokenTrace:
    written = captions.exit_layers > 0
    early = (written & (written.cumsum(1) > 1))[:, 1:].to(model.device)  # the first token comes from the prompt
    ids = captions.sequences[:, :-1]
    ids = torch.where(written[:, :-1], ids, ids[:, :1])  # nobody looks at what comes after the end
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.to(model.device, model.dtype)),
        decoder_input_ids=ids.to(model.device),
        token_exits=ExitRun(None),
        output_hidden_states=True,
        use_cache=False,
    )
    hidden, count = [part[early][:, None] for part in output.decoder_hidden_states], int(early.sum())  # [N, 1, H]
    walker = state = None
    if policy is not None:
        walker = DecoderWalker(model, policy, ExitRun(policy))
        state = policy.init_state(count, walker.num_words, model.device)
    words, scores = [], []
    for index, layer in enumerate(model.exit_layers[:-1]):
        logits, score = None, torch.zeros(count, device=model.device)
        if policy is not None and index in policy.muted:
            score = score - torch.inf
        elif policy is not None and walker is not None:
            signal = walker.exit_signal(index, hidden[layer], None, policy.asks_at(index), hidden[layer - 1])
            state, score, _ = policy.update(state, signal, index)
            logits = signal.logits if walker.policy_answers else None
        logits = model.exit_logits(index, hidden[layer][:, 0]) if logits is None else logits
        words.append(logits.argmax(-1))
        scores.append(score)
    words.append(output.logits[early].argmax(-1))
    scores.append(torch.zeros(count, device=model.device))
    return TokenTrace(torch.stack(words, 1).cpu(), torch.stack(scores, 1).float().cpu())
