"""One token for every row of a batch: layers run until each row's word is decided, and the cache misses nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from ..families.context import each
from ..families.decoders import TokenContext
from ..modeling.protocol import TorchExitWriter
from ..policies.base import ExitPolicy
from ..policies.decay import decayed
from ..signals import ExitPoint, ExitSignal, scalars_of
from ..walking.step import Standing, Walks, parted, rows_of, step_to_exit, stretches
from .token_cache import token_cache
from .word_heads import WORD_HEADS, Shortlist


class Token(NamedTuple):
    """Logits of the new token `[B, V]` and the exit index each row left at `[B]`, -1 for rows that did not run."""

    logits: Tensor
    exit_index: Tensor


class ExitRun:
    """What one call of `generate` carries from token to token.

    Args:
        policy: says who leaves; `None` to run every layer.
        images: how many images or prompts there are, where rows may be several for each.
    """

    def __init__(self, policy: ExitPolicy | None, images: int | None = None) -> None:
        self.policy, self.images = policy, images
        self.finished: Tensor | None = None  # [B], rows that write no more, where `EndWatch` looks
        self.shortlist: Shortlist | None = None  # made once, by the first token that needs it
        self.plain: dict[Any, bool] = {}  # see `TokenContext`
        self.exit_layers: list[Tensor] = []  # of each pass, [B]; 0 for rows that had finished
        self.draft_layers: Tensor | None = None  # in the shape of the sequences, where a lossless run has been
        self.draft_counts: Any = None  # of that run

    def under_way(self, batch: int, device: Any) -> Tensor:
        """Numbers of the rows that still write; of all, where none does and the answers go nowhere."""
        if self.finished is None or self.finished.all():
            return torch.arange(batch, device=device)
        return (~self.finished).nonzero().flatten()

    def image_numbers(self, batch: int) -> list[int]:
        """The number of the image or prompt of each of `batch` rows: beams and several texts of one stand together."""
        each = batch // (self.images or batch)
        return [row // each for row in range(batch)]

    def watching(self, options: dict[str, Any], settings: Any) -> dict[str, Any]:
        """Arguments of `generate`, with criteria that tell this run which rows have ended; beams need none.

        Args:
            options: by name.
            settings: the generation config that the call goes by.
        """
        if (settings.num_beams or 1) > 1:
            return options
        return {**options, "stopping_criteria": EndWatch(options.get("stopping_criteria") or (), self)}

    def note(self, layers: Tensor) -> None:
        """Keep the layers `[B]` of one pass."""
        if self.finished is not None:
            if self.finished.all():  # a pass that some devices make too many
                return
            layers = layers.masked_fill(self.finished, 0)
        self.exit_layers.append(layers)


class EndWatch(StoppingCriteriaList):
    """The criteria that end the rows of a call of `generate`, each for itself; what they say is told to the run as well.

    Not for beams, whose rows change places.

    Args:
        criteria: the caller's, or all of them.
        run: of that call.
    """

    def __init__(self, criteria: Iterable[Any], run: ExitRun) -> None:
        super().__init__(criteria)
        self.run = run
        # else ended rows write on, as in the stock loop
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in self)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self.pads:
            self.run.finished = done if self.run.finished is None else self.run.finished | done
        return done


class GivenCriteria(StoppingCriteriaList):
    """The caller's criteria of a lossless run, and the tokenizer that its stop strings need.

    The stock code drops the tokenizer where a loop of one's own decodes.

    Args:
        criteria: the caller's.
        tokenizer: the caller's, or `None`.
    """

    def __init__(self, criteria: Iterable[Any], tokenizer: Any) -> None:
        super().__init__(criteria)
        self.tokenizer = tokenizer


class DecoderWalker(Walks):
    """A model that writes, as decoding walks its decoder.

    Args:
        model: the captioner or language model.
        policy: for this token.
        run: of the whole text.
    """

    def __init__(self, model: TorchExitWriter, policy: ExitPolicy, run: ExitRun) -> None:
        self.model, self.policy, self.exit_run, self.backbone = model, policy, run, model.backbone
        self.layers = self.backbone.layers(model.token_decoder)
        self.exit_layers: tuple[int, ...] = model.exit_layers
        self.num_words = 0  # that the policy's signals are about
        if policy.reads_logits:
            self.num_words = model.config.word_config.vocab_size
            if model.config.exit_signal == "shortlist":
                run.shortlist = run.shortlist or Shortlist(model.exit_shortlist)
                self.num_words = len(run.shortlist.words)
        self.shortlist = run.shortlist if policy.reads_logits else None
        self.policy_answers = policy.reads_logits and self.shortlist is None
        # the vocabulary layer is read once for all rows, wherever they left
        self.words_last = not self.policy_answers and WORD_HEADS.get(model.config.exit_head).borrows

    def run_layer(self, layer: int, hidden: Tensor, context: TokenContext) -> Tensor:
        """States `[B, 1, H]` after layer `layer` (1-based)."""
        return self.backbone.step(self.layers[layer - 1], hidden, context)

    def exit_signal(
        self,
        exit_index: int,
        hidden: Tensor,
        context: TokenContext | None,
        asks: Sequence[str] = (),
        before: Tensor | None = None,
    ) -> ExitSignal:
        """What exit `exit_index` tells of the states after its layer, `[B, 1, H]`: see `walking.step.Walker`."""
        hidden = hidden[:, 0]
        if self.shortlist is not None:
            features = self.model.features(exit_index, hidden)
            logits = self.shortlist.logits(features, self.model.vocabulary(exit_index))
        else:
            logits = self.word_logits(exit_index, hidden) if self.policy_answers else hidden[:, :0]
        if not asks:
            return ExitSignal(logits)
        last, gates = exit_index == len(self.exit_layers) - 1, self.model.exit_gates
        point = ExitPoint(
            logits if self.policy.reads_logits else None,
            pooled=None if last or "gate" not in asks else self.model.gate_states(hidden),
            before=None if before is None else before[:, 0],
            after=hidden,
            gate=gates[str(self.exit_layers[exit_index])] if len(gates) and not last else None,
        )
        return ExitSignal(logits, scalars_of(asks, point))

    def word_logits(self, exit_index: int, hidden: Tensor) -> Tensor:
        """The exit's logits over the whole vocabulary, `[B, V]`."""
        return self.model.exit_logits(exit_index, hidden)

    def draft_logits(self, exit_index: int, states: Tensor, answer: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What an exit drafts from, over a shortlist where there is one: `[R, K]` and its words, or `[R, V]`.

        Args:
            exit_index: of the exit, 0-based.
            states: after its layer `[R, H]`.
            answer: the policy's, where it was asked.
        """
        if answer is not None and self.policy.reads_logits:
            return answer, None if self.shortlist is None else self.shortlist.words
        if self.model.config.exit_shortlist is None:
            return self.word_logits(exit_index, states), None
        words = self.exit_run.shortlist = self.exit_run.shortlist or Shortlist(self.model.exit_shortlist)
        return words.logits(self.model.features(exit_index, states), self.model.vocabulary(exit_index)), words.words

    def answers(self, exit_index: int, hidden: Tensor, answer: Tensor | None) -> Tensor:
        """What is kept of rows that leave: their logits `[B, V]`, or with `words_last` what those are made of `[B, H]`."""
        if answer is not None and self.policy_answers:
            return answer
        return (self.model.features if self.words_last else self.word_logits)(exit_index, hidden[:, 0])

    def token(self, answers: Tensor, exit_index: Tensor) -> Token:
        """The answers of all rows, from what was kept of each."""
        return Token(self.model.words(answers) if self.words_last else answers, exit_index)


def decode_token(walker: DecoderWalker, hidden: Tensor, context: TokenContext, rows: Tensor) -> Token:
    """Run the layers until every row is decided; a decided row's state stands in for it in the layers above.

    Args:
        walker: the decoder and the policy.
        hidden: states of the new tokens `[B, 1, H]`.
        context: of a cache that holds the prompt in every layer.
        rows: numbers of the rows that run, at least one; the others get entries and no answer.
    """
    policy, batch, device = walker.policy, len(hidden), hidden.device
    whole = context.rotary

    def project(layer: int, states: Tensor, of: Tensor | None) -> tuple[Tensor, Tensor]:
        rotary = each(whole, lambda part: part if of is None or len(part) == 1 else part.index_select(0, of))
        return walker.backbone.project(walker.layers[layer - 1], states, rotary)

    cache = token_cache(context.cache, project)
    context = replace(context, cache=cache, plain=walker.exit_run.plain)
    kept, final, exit_index = None, hidden.clone(), torch.full((batch,), -1, device=device)
    running = torch.zeros(batch, dtype=torch.bool, device=device).index_fill_(0, rows, True)
    state = policy.init_state(len(rows), walker.num_words, device)
    if len(rows) < batch:
        left = (~running).nonzero().flatten()
        cache.keep(rows, left, final[left])
        hidden, context = hidden[rows], context.of(rows, tuple(rows.tolist()))
    last = walker.exit_layers[-1]
    for layers, index in stretches(walker, policy.wants):
        layer = layers[-1]
        asked = index if layer < last or walker.policy_answers else None  # at the last, others answer without the policy
        (hidden, _, state, _), outcome = step_to_exit(walker, layers, Standing(hidden, context, state), policy, asked)
        answer = None if outcome is None else outcome.answer
        parts = parted([True] * len(rows) if outcome is None else outcome.leave.tolist())  # the one wait for the device
        if not parts.leaving:
            continue
        gone, stay = (torch.tensor(part, dtype=torch.long, device=device) for part in parts)
        leaving, last_states = rows[gone], hidden[gone]
        answers = walker.answers(index, last_states, None if answer is None else answer[gone])
        kept = answers.new_zeros(batch, answers.shape[-1]) if kept is None else kept
        kept[leaving], final[leaving], exit_index[leaving] = answers.to(kept.dtype), last_states, index
        running[leaving] = False
        if not len(stay):
            break
        rows, hidden = rows[stay], hidden[stay]
        context = context.of(stay, tuple(rows.tolist()))
        state = rows_of(state, stay)
        left = (~running).nonzero().flatten()
        cache.keep(rows, left, final[left])
    for above in range(layer + 1, last + 1):
        cache.close(above, final)
    return walker.token(kept, exit_index)  # type: ignore[arg-type]  # at least one row left


def decode(
    model: TorchExitWriter,
    ids: Tensor,
    mask: Tensor | None,
    encoder: Tensor | None,
    cache: Any,
    run: ExitRun,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """One new token of each row through a decoder: its logits `[B, 1, V]` and the layer it left after `[B, 1]`.

    Args:
        model: the captioner or language model.
        ids: the tokens to go on from `[B, 1]`.
        mask: of the tokens so far `[B, T]`, where some are padding.
        encoder: states of the encoder, or `None` without one.
        cache: of the tokens before; gets its next entry in every layer.
        run: of the text.
        options: the stock decoder's other arguments.
    """
    backbone, decoder = model.backbone, model.token_decoder
    positions = options.get("position_ids")
    if positions is None:
        positions = torch.full((1, 1), cache.get_seq_length(), device=ids.device)
    hidden = backbone.embed(decoder, ids, positions, options)
    context = backbone.context(decoder, hidden, mask, cache, positions, encoder)
    policy: Any = run.policy  # there is one where tokens are decoded here
    if model.config.exit_decay is not None:
        policy = decayed(policy, model.config.exit_decay, len(run.exit_layers))
    rows = run.under_way(len(ids), ids.device)
    token = decode_token(DecoderWalker(model, policy, run), hidden, context, rows)
    layers = torch.tensor((*model.exit_layers, 0), device=ids.device)  # index -1 is 0
    return token.logits[:, None], layers[token.exit_index][:, None]


def exit_layers_of(output: Any, run: ExitRun) -> Tensor:
    """The layer each token of finished captions left after, in the shape of `sequences`; 0 for prompt and padding.

    Args:
        output: what `generate` returned, as a dict.
        run: of that call.
    """
    if run.draft_layers is not None:
        return run.draft_layers
    sequences, passes = output.sequences, torch.stack(run.exit_layers)  # [R, P + T], [T, rows]
    path = output.get("beam_indices")
    if path is None:
        steps, layers = len(passes), passes.T
    else:
        steps = path.shape[1]
        layers = passes[:steps].T.gather(0, path.clamp_min(0).long()).masked_fill(path < 0, 0)
    return torch.nn.functional.pad(layers, (sequences.shape[1] - steps, 0))
