"""The full model's own text, with fewer layers: early exits draft, the layers above check.

A token whose policy says leave is not final here. What its exit answers is a draft of the next token; its state waits at
the exit, and the next token goes on from the draft. When a token does not leave, or too many wait, all that wait go through
the layers above together with it, in one pass, from the very states they stopped with: nothing is computed twice, and keys
and values are the full model's. The last layer then checks the drafts one after the other. The first wrong one is replaced
by the last layer's token, and what was drafted after it is rolled back.

Papers: self-speculative decoding as in LayerSkip (https://arxiv.org/abs/2404.16710), states that wait as in FREE
(https://arxiv.org/abs/2310.05424), sampling by the rule of speculative decoding (https://arxiv.org/abs/2211.17192). Here
tokens may wait at any exit, each where its policy let it go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import EncoderDecoderCache
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput

from ..families.decoders import CACHE_NAMES, TokenContext, cache_name
from ..modeling.finite import check_finite
from ..modeling.protocol import TorchExitWriter
from .checks import check_lossless_call
from .decoding import DecoderWalker, ExitRun
from .draft_cache import draft_cache
from .drafts import Row, Speaker, Waiting
from .token_cache import require_dynamic, self_attention_of


@dataclass
class DraftCounts:
    """What a lossless run did.

    Attributes:
        layer_calls: calls of a layer behind the pass over the prompt, which captions that begin with one token go without;
            layer_tokens: tokens that each layer ran there, by layer.
        drafted: drafts made at each exit but the last; accepted: those of them that the last layer confirmed.
        checks: times that a row's tokens reached the last layer; tokens: written after the prompt's own.
    """

    layer_calls: int
    layer_tokens: list[int]
    drafted: list[int]
    accepted: list[int]
    checks: int = 0
    tokens: int = 0


class LosslessWalker(DecoderWalker):
    """Runs the newest token of every row, and with those that do not leave all that wait.

    Args:
        model: the captioner or language model.
        run: of the text, with the policy whose leave makes a draft.
        speaker: picks tokens.
        most: drafts that may wait.
        cache: holds the prompts.
        prompt_mask: of the prompts `[B, P]`, or `None` where none is padded.
        encoder: states of the encoder `[B, S, H]`, or `None`.
        types: segment of the new tokens `[B, 1]`, or `None`.
    """

    def __init__(
        self,
        model: TorchExitWriter,
        run: ExitRun,
        speaker: Speaker,
        most: int,
        cache: Any,
        prompt_mask: Tensor | None,
        encoder: Tensor | None,
        types: Tensor | None,
    ) -> None:
        super().__init__(model, run.policy, run)  # type: ignore[arg-type]
        self.speaker, self.most, self.encoder, self.types = speaker, most, encoder, types
        self.cache = draft_cache(cache)
        self.visible = None if prompt_mask is None or prompt_mask.all() else prompt_mask.bool()
        self.window = self.backbone.window(model.token_decoder)
        self.exit_at = {layer: index for index, layer in enumerate(self.exit_layers)}
        self.last = self.exit_layers[-1]
        early = len(self.exit_layers) - 1
        self.counts = DraftCounts(0, [0] * self.last, [0] * early, [0] * early)

    def advance(self, rows: Sequence[Row], longest: int | None) -> None:
        """One more token of each row, as far as its policy says; rows whose tokens have run every layer are checked.

        Args:
            rows: none of them ended.
            longest: length at which texts end, or `None`: what stands before the last token is not worth a draft.
        """
        policy, contexts = self.policy, {}  # type: ignore[var-annotated]
        self._embed(rows)
        going = list(rows)
        asking = [row for row in rows if len(row.drafts) < self.most and row.length + len(row.drafts) + 1 != longest]
        state = policy.init_state(len(asking), self.num_words, self.model.device)
        for layer in range(1, self.last + 1):
            before = [row.waits[-1].states[-1] for row in asking]
            for together in _of_one_width(going):
                self._run(layer, together, contexts)
            index = self.exit_at.get(layer, len(self.exit_layers) - 1)
            if not asking or layer == self.last or layer not in self.exit_at or not policy.wants(index):
                continue
            states = torch.stack([row.waits[-1].states[-1] for row in asking])
            signal = self.exit_signal(index, states[:, None], None, policy.asks_at(index), torch.stack(before)[:, None])
            state, _, answer, leave = policy.step(state, signal, index)
            if not any(leave.tolist()):  # the one wait for the device
                continue
            leaving = [row for row, leaves in zip(asking, leave.tolist(), strict=True) if leaves]
            logits, words = self.draft_logits(index, states[leave], answer[leave])
            made = self.speaker.draft(leaving, index, logits, words, self.model.config.word_config.vocab_size)
            drafted = {row.number for row, did in zip(leaving, made, strict=True) if did}
            self.counts.drafted[index] += len(drafted)
            # what ends a text is checked at once
            waiting = {
                row.number for row in leaving if row.number in drafted and row.drafts[-1].token not in self.speaker.ends
            }
            keep = [place for place, row in enumerate(asking) if row.number not in drafted]
            state = type(state)(*(part[keep] for part in state))
            asking = [asking[place] for place in keep]
            going = [row for row in going if row.number not in waiting]
            if not going:
                return
        self._check(going)

    def _embed(self, rows: Sequence[Row]) -> None:
        """States of the newest tokens before the first layer."""
        device = self.model.device
        ids = torch.stack([row.text[row.column - row.shift] for row in rows])[:, None]
        positions = torch.tensor([[row.column - row.offset] for row in rows], device=device)
        options = {} if self.types is None else {"token_type_ids": self.types[[row.number for row in rows]]}
        hidden = self.backbone.embed(self.model.token_decoder, ids, positions, options)
        for row, states in zip(rows, hidden, strict=True):
            row.waits.append(Waiting(0, row.column, states))

    def _run(self, layer: int, rows: Sequence[Row], contexts: dict[Any, Any]) -> None:
        """Bring the tokens in front of some rows, equally many of each, through one layer."""
        fronts = [row.waits[-1] for row in rows]
        hidden = fronts[0].states[None] if len(rows) == 1 else torch.stack([front.states for front in fronts])
        numbers, columns = [row.number for row in rows], [front.column for front in fronts]
        key = (*numbers, *columns, hidden.shape[1])
        if key not in contexts:
            contexts[key] = self._context(rows, numbers, columns, hidden)
        context, seen = contexts[key]
        self.cache.look(*seen)
        hidden = self.run_layer(layer, hidden, context)
        self.counts.layer_calls += 1
        self.counts.layer_tokens[layer - 1] += hidden.shape[0] * hidden.shape[1]
        for row, front, states in zip(rows, fronts, hidden, strict=True):
            row.waits[-1] = Waiting(layer, front.column, states)
            if len(row.waits) > 1 and row.waits[-2].depth == layer:  # those that waited here come along
                other = row.waits[-2]
                row.waits[-2:] = [Waiting(layer, other.column, torch.cat([other.states, states]))]

    def _context(
        self, rows: Sequence[Row], numbers: list[int], firsts: list[int], hidden: Tensor
    ) -> tuple[TokenContext, Any]:
        """What the layers need for these tokens, and where they look in the cache."""
        device, tokens = hidden.device, hidden.shape[1]
        columns = torch.tensor(firsts, device=device)[:, None] + torch.arange(tokens, device=device)
        positions = columns - torch.tensor([row.offset for row in rows], device=device)[:, None]
        first, width = firsts[0] if len(set(firsts)) == 1 else None, max(firsts) + tokens
        masks = partial(self._mask, numbers, columns, first, width, hidden)
        encoder = None if self.encoder is None else self.encoder[numbers]
        windowed = None if self.window is None else masks(self.window)
        rotary = self.backbone.rotary(self.model.token_decoder, hidden, positions)
        resting = None if len(numbers) == len(self.cache.entries[0].keys) else tuple(numbers)
        plain = self.exit_run.plain
        context = TokenContext(self.cache, masks(None), positions, encoder, windowed, rotary, resting, plain)
        return context, (torch.tensor(numbers, device=device), columns, first, width)

    def _mask(
        self, rows: list[int], columns: Tensor, first: int | None, width: int, hidden: Tensor, window: int | None
    ) -> Tensor | None:
        """Which columns tokens may look at, `[R, 1, N, width]`, in the form of the attention; `None` for all of them."""
        if columns.shape[1] == 1 and first is not None and self.visible is None and (window is None or width <= window):
            return None
        places = torch.arange(width, device=columns.device)
        allowed = places <= columns[..., None]
        if window is not None:
            allowed = allowed & (places > columns[..., None] - window)
        if self.visible is not None:
            seen = self.visible[rows]
            allowed = allowed & torch.nn.functional.pad(seen, (0, width - seen.shape[1]), value=True)[:, None]
        if self.model.config.word_config._attn_implementation == "sdpa":
            return allowed[:, None]
        lowest = torch.finfo(hidden.dtype).min
        return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, lowest)[:, None]

    def _check(self, rows: Sequence[Row]) -> None:
        """The last layer's word on all that waited."""
        states = [row.waits[-1].states for row in rows]
        logits = self.model.exit_logits(len(self.exit_layers) - 1, torch.cat(states))
        numbers = self.exit_run.image_numbers(len(self.cache.entries[0].keys))
        for row, given in zip(rows, logits.split([len(part) for part in states]), strict=True):
            check_finite(given.flatten()[None], [numbers[row.number]])
            drafts = list(row.drafts)
            right = self.speaker.check(row, given, self.exit_layers)
            self.counts.checks += 1
            for draft in drafts[:right]:
                self.counts.accepted[draft.exit_index] += 1


def _of_one_width(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by how many tokens they have in front."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(len(row.waits[-1].states), []).append(row)
    return list(groups.values())


def decode_lossless(
    model: TorchExitWriter,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    draft_run: ExitRun,
    most_drafts: int,
    draft_streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """The loop of `generate(..., lossless=True)`, in the form that `custom_generate` takes.

    Args:
        model: the captioner or language model.
        input_ids: prompts `[B, T]`.
        logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` prepares them.
        draft_run: with the policy; gets the `DraftCounts` of the run.
        most_drafts: that may wait in a row.
        draft_streamer: gets tokens as they are final, or `None`.

    Raises:
        UsageError: for a cache, an attention or a mask whose rows cannot be taken apart.
    """
    config = generation_config
    check_lossless_call(model, model_kwargs)
    mask = model_kwargs.get("decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask")
    cache, first = _begin(model, input_ids, config, mask, {**model_kwargs, "token_exits": ExitRun(None, draft_run.images)})
    keeps = config.return_dict_in_generate
    speaker = Speaker(
        len(input_ids),
        logits_processor,
        stopping_criteria,
        bool(config.do_sample),
        keeps and bool(config.output_scores),
        keeps and bool(config.output_logits),
        draft_streamer,
    )
    encoder = model_kwargs["encoder_outputs"][0] if model.config.is_encoder_decoder else None
    types = model_kwargs.get("token_type_ids")
    types = None if types is None else types[:, -1:]
    walker = LosslessWalker(model, draft_run, speaker, most_drafts, cache, mask, encoder, types)
    rows = _rows(model, input_ids, cache.get_seq_length() or 1, mask, model_kwargs)
    for row, logits in zip(rows, () if first is None else first, strict=first is not None):
        speaker.check(row, logits, model.exit_layers)
    longest = stopping_criteria.max_length
    while running := [row for row in rows if not row.stopped]:
        walker.advance(running, longest)
    if not speaker.pads:  # as in the stock loop, rows that have ended write on until all have
        longest = max(row.length for row in rows)
        while running := [row for row in rows if row.length < longest]:
            walker.advance(running, longest)
        for row in rows:
            row.length = longest
    draft_run.draft_counts = walker.counts
    walker.counts.tokens = sum(len(row.exit_layers) for row in rows)
    if draft_streamer is not None:
        draft_streamer.end()
    walker.cache.write_back(self_attention_of(cache).layers, [row.length - 1 + row.shift for row in rows])
    return _result(rows, input_ids.shape[1], config, cache, draft_run)


def starts_with_a_draft(model: TorchExitWriter, prompt: int) -> bool:
    """Whether the first token that is written may be a draft: where the prompt is one token, it is decoded as all others.

    With longer prompts the pass over them brings the first token along.

    Args:
        model: the captioner or language model.
        prompt: its tokens.
    """
    return model.crosses and prompt == 1


def _begin(
    model: TorchExitWriter, ids: Tensor, config: Any, mask: Tensor | None, options: dict[str, Any]
) -> tuple[Any, Tensor | None]:
    """A cache that holds the prompts, or the images and no token yet, and logits `[B, 1, V]` of what follows the prompts."""
    cache = next((options[name] for name in CACHE_NAMES if options.get(name) is not None), None)
    fresh = isinstance(cache, EncoderDecoderCache) and cache.get_seq_length() == 0 and not any(cache.is_updated.values())
    if fresh and starts_with_a_draft(model, ids.shape[1]) and (mask is None or bool(mask.all())):
        require_dynamic(cache, crosses=True)
        model.read_images(options["encoder_outputs"][0], cache)
        return cache, None
    output = model._prefill(ids, config, options)
    return output[cache_name(type(output))], output.logits[:, -1:]  # type: ignore[arg-type]


def _rows(model: TorchExitWriter, ids: Tensor, width: int, mask: Tensor | None, options: dict[str, Any]) -> list[Row]:
    """Rows whose prompts have run every layer, `width` columns of each."""
    positions = options.get("position_ids")
    if positions is not None:
        offsets = (width - 1 - positions.expand(len(ids), -1)[:, -1]).tolist()
    elif mask is not None and not model.config.is_encoder_decoder:
        offsets = (width - mask[:, :width].sum(1)).tolist()
    else:
        offsets = [0] * len(ids)
    length = ids.shape[1]
    return [Row(number, text.clone(), length, width - length, offsets[number]) for number, text in enumerate(ids)]


def _result(rows: list[Row], prompt: int, config: Any, cache: Any, run: ExitRun) -> Any:
    """What `generate` returns."""
    longest = max(row.length for row in rows)
    sequences = rows[0].text.new_full((len(rows), longest), int(config._pad_token_tensor or 0))
    layers = torch.zeros_like(sequences)
    for row in rows:
        written = row.exit_layers[: row.length - prompt]
        sequences[row.number, : row.length] = row.text[: row.length]
        layers[row.number, prompt : row.length] = layers.new_tensor(written)
    run.draft_layers = layers
    if not config.return_dict_in_generate:
        return sequences

    def by_step(name: str) -> tuple[Tensor, ...] | None:
        kept = [getattr(row, name) for row in rows]
        if not kept[0]:
            return None
        ended = torch.zeros_like(kept[0][0])
        return tuple(
            torch.stack([one[step] if step < len(one) else ended for one in kept]) for step in range(longest - prompt)
        )

    values = {"sequences": sequences, "scores": by_step("scores"), "logits": by_step("logits")}
    kind = GenerateEncoderDecoderOutput if isinstance(cache, EncoderDecoderCache) else GenerateDecoderOnlyOutput
    return kind(**values, **{cache_name(kind): cache})  # type: ignore[arg-type]
