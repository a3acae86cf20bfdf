"""What a policy's scores are along what a model writes by itself: enough to propose thresholds, little enough to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from transformers import GenerationMixin

from ..errors import CalibrationError
from ..modeling.protocol import TorchExitWriter
from ..policies.base import ExitPolicy
from ..problem_types import SINGLE_LABEL
from .checks import check_generation, generation_settings
from .decoding import DecoderWalker, ExitRun, exit_layers_of


class Written(NamedTuple):
    """Texts of a batch: token ids with their prompts `[B, S]`, the layer each left after `[B, S]` (0: prompt, padding)."""

    sequences: Tensor
    exit_layers: Tensor


class TokenTrace(NamedTuple):
    """Every exit on N tokens that may leave early, those of a full-depth text after its first.

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


class TracedTokens:
    """What a policy may learn its own numbers from; stands in for an `ExitTrace`.

    Args:
        model: the captioner or language model.
        trace: tokens to learn from, where the policy learns.

    Attributes:
        quality: whether each exit's word is the full model's `[N, E]`.
        scalars: names of the signals that the model gives.
    """

    problem_type = SINGLE_LABEL

    def __init__(self, model: TorchExitWriter, trace: TokenTrace | None = None) -> None:
        self.model, self.exit_layers = model, model.exit_layers
        self.num_exits = len(self.exit_layers)
        self.scalars: tuple[str, ...] = model.signals
        self.costs = tuple(map(float, model.config.exit_cost or self.exit_layers))
        self._trace = trace

    @property
    def _tokens(self) -> TokenTrace:
        if self._trace is None:
            raise CalibrationError("This policy does not say that it learns (`learns = True`), yet reads rows.")
        return self._trace

    @property
    def num_rows(self) -> int:
        return len(self._tokens.words)

    @property
    def quality(self) -> Tensor:
        return self._tokens.agrees

    def select(self, rows: Tensor | Sequence[int]) -> TracedTokens:
        """Some of the tokens."""
        index = torch.as_tensor(rows)
        return TracedTokens(self.model, TokenTrace(*(part[index] for part in self._tokens)))

    def signal(self, exit_index: int) -> NoReturn:
        """None is kept."""
        self._no_logits()

    def row_values(self, of_logits: Any, exit_index: int) -> NoReturn:
        """No logits are kept to compute them from."""
        self._no_logits()

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


def write(model: TorchExitWriter, prompts: Sequence[Any], policy: ExitPolicy | None, options: dict[str, Any]) -> Written:
    """Texts of a batch as `generate` writes them with this policy; the model's own is not looked at.

    Args:
        model: the captioner or language model, in evaluation mode.
        prompts: from its `read_prompts`.
        policy: `None` for the full model.
        options: for `generate`.
    """
    run, inputs = ExitRun(policy), model.prompt_inputs(prompts)
    options = {**options, "return_dict_in_generate": True}
    settings = generation_settings(model, options)
    model.check_inputs(None, settings, {**options, **inputs})
    check_generation(settings, options, policy is not None and policy.may_leave, wants_layers=True)
    output = GenerationMixin.generate(model, **inputs, token_exits=run, **run.watching(options, settings))
    return Written(output.sequences.cpu(), exit_layers_of(output, run).cpu())


def token_trace(
    model: TorchExitWriter, batches: Iterable[tuple[Sequence[Any], Written]], policy: ExitPolicy | None = None
) -> TokenTrace:
    """Scores and first words of every exit along given texts, batch by batch.

    Each token is asked with the full-depth states of those before it. Serving differs once a token has left early, so what
    follows from a trace has to be confirmed by generation.

    Args:
        model: the captioner or language model, in evaluation mode.
        batches: prompts, and what the full model wrote after them.
        policy: whose scores; `None` for words alone, with scores 0.

    Raises:
        CalibrationError: if no text has a token that may leave early.
    """
    parts = [_trace_batch(model, prompts, written, policy) for prompts, written in batches]
    trace = TokenTrace(torch.cat([part.words for part in parts]), torch.cat([part.scores for part in parts]))
    if not len(trace.words):
        raise CalibrationError(
            "No text has a token that may leave early: the first runs in full, and all texts end there. Let "
            "generation go on (max_new_tokens), or train the model further.",
            field="rows",
        )
    return trace


@torch.inference_mode()
def _trace_batch(model: TorchExitWriter, prompts: Sequence[Any], texts: Written, policy: ExitPolicy | None) -> TokenTrace:
    written = texts.exit_layers > 0
    start = max(int(written.any(0).int().argmax()) - 1, 0)  # the prompts' last column
    early = (written & (written.cumsum(1) > 1))[:, start + 1 :].to(model.device)  # the first token comes from the prompt
    ids = texts.sequences[:, :-1].clone()
    ended = ~written[:, start + 1 : -1]
    ids[:, start + 1 :] = torch.where(ended, ids[:, start, None], ids[:, start + 1 :])  # nobody looks there
    states, logits = model.full_pass(model.prompt_inputs(prompts), ids.to(model.device), start)
    hidden, count = [part[early][:, None] for part in states], int(early.sum())  # [N, 1, H]
    walker = state = None
    if policy is not None:
        walker = DecoderWalker(model, policy, ExitRun(policy))
        state = policy.init_state(count, walker.num_words, model.device)
    words, scores = [], []
    for index, layer in enumerate(model.exit_layers[:-1]):
        answer, score = None, torch.zeros(count, device=model.device)
        if policy is not None and index in policy.muted:
            score = score - torch.inf
        elif policy is not None and walker is not None:
            signal = walker.exit_signal(index, hidden[layer], None, policy.asks_at(index), hidden[layer - 1])
            state, score, _ = policy.update(state, signal, index)
            answer = signal.logits if walker.policy_answers else None
        answer = model.exit_logits(index, hidden[layer][:, 0]) if answer is None else answer
        words.append(answer.argmax(-1))
        scores.append(score)
    words.append(logits[early].argmax(-1))
    scores.append(torch.zeros(count, device=model.device))
    return TokenTrace(torch.stack(words, 1).cpu(), torch.stack(scores, 1).float().cpu())
