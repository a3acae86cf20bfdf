"""What lossless runs would cost: the exits' scores and drafts along the full model's own texts, and a run replayed on them.

The text of a lossless run is the full model's, so that a trace of it tells what every exit says at every token that stays;
only of tokens that are taken back it tells no more than where they would have stood.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..modeling.protocol import TorchExitWriter
from ..policies.base import ExitPolicy
from .decoding import DecoderWalker, ExitRun
from .full_texts import FullText
from .lossless import starts_with_a_draft


class DraftTrace(NamedTuple):
    """Every early exit on the tokens of some texts that may leave: all that follow the prompt but the last.

    Where a prompt is one token, as that of captions, it may leave too.

    Attributes:
        scores: the policy's `[N, E - 1]`, float32; -inf at muted exits.
        right: whether the exit's draft is what the full model wrote `[N, E - 1]`.
        ends: whether the exit's draft ends a text `[N, E - 1]`.
        lengths: tokens of each text, N together.
        ended: whether each text ended by itself, and not where it had to.
    """

    scores: Tensor
    right: Tensor
    ends: Tensor
    lengths: tuple[int, ...]
    ended: tuple[bool, ...]


class DraftCosts(NamedTuple):
    """What parts of a pass cost, in seconds or any other unit.

    Attributes:
        layer: one layer for one token; more: for every further token of the same pass.
        ask: an exit's signal and the policy's step.
        words: the last layer's vocabulary for one token; more_words: for every further token.
        token: what a token costs before its first layer.
        draft: what a draft costs once its token leaves: the exit's words, where the policy does not read them.
        plain: a token of plain decoding; `None` for what its layers and words cost.
        prompt: what a text costs before the first token that may leave, in either way.
    """

    layer: float
    more: float
    ask: float
    words: float
    more_words: float
    token: float = 0.0
    draft: float = 0.0
    plain: float | None = None
    prompt: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A lossless run as a trace lets expect it.

    Attributes:
        cost: per token written, its share of the prompt included, in the unit of the costs; plain: that of plain decoding.
        layer_calls: per token written.
        drafted, accepted: drafts per token written, and the share of them that is right.
    """

    cost: float
    plain: float
    layer_calls: float
    drafted: float
    accepted: float

    @property
    def speed_up(self) -> float:
        """Plain decoding's cost over this one."""
        return self.plain / self.cost


@torch.inference_mode()
def trace_drafts(
    model: TorchExitWriter, texts: Sequence[FullText], policy: ExitPolicy, ends: Sequence[int] = ()
) -> DraftTrace:
    """Scores and drafts of every early exit along texts of the full model.

    Args:
        model: a captioner or language model with exits, in evaluation mode.
        texts: that it wrote.
        policy: whose scores.
        ends: ids that end texts.

    Raises:
        CalibrationError: if no text has a token that may leave.
    """
    parts, lengths, ended = [], [], []
    for text in texts:
        first = text.start - starts_with_a_draft(model, text.start)
        if len(text.ids) - 1 <= first:
            continue
        ids = torch.tensor(text.ids, device=model.device)
        states, _ = model.full_pass(model.prompt_inputs([text.prompt]), ids[None, :-1], first)
        parts.append(_ask(model, policy, [part[0][:, None] for part in states], ids[first + 1 :], ids.new_tensor(ends)))
        lengths.append(len(ids) - 1 - first)
        ended.append(text.ids[-1] in ends)
    if not any(length > 1 or ends_there for length, ends_there in zip(lengths, ended, strict=True)):
        raise CalibrationError(
            "No text has a token that may leave: the last is not worth a draft, and what stands before it comes from the "
            "prompt. Let generation go on.",
            field="rows",
        )
    scores, right, ending = map(torch.cat, zip(*parts, strict=True))
    return DraftTrace(scores, right, ending, tuple(lengths), tuple(ended))


def _ask(
    model: TorchExitWriter, policy: ExitPolicy, hidden: list[Tensor], following: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    walker = DecoderWalker(model, policy, ExitRun(policy))
    state = policy.init_state(len(following), walker.num_words, model.device)
    scores, drafts = [], []
    for index, layer in enumerate(model.exit_layers[:-1]):
        answer = None
        score = torch.full((len(following),), -torch.inf)
        if index not in policy.muted:
            signal = walker.exit_signal(index, hidden[layer], None, policy.asks_at(index), hidden[layer - 1])
            state, score, answer = policy.update(state, signal, index)
        logits, words = walker.draft_logits(index, hidden[layer][:, 0], answer)
        best = logits.argmax(-1)
        scores.append(score.float().cpu())
        drafts.append(best if words is None else words[best])
    made = torch.stack(drafts, 1)
    return torch.stack(scores, 1), (made == following[:, None]).cpu(), torch.isin(made, ends).cpu()


def replay_drafts(
    trace: DraftTrace, policy: ExitPolicy, most: int, exit_layers: Sequence[int], costs: DraftCosts
) -> Replayed:
    """What a lossless run with this policy would cost.

    Args:
        trace: of the texts it would write.
        policy: with thresholds.
        most: drafts that may wait.
        exit_layers: layers (1-based) of all exits.
        costs: of the parts of a pass.
    """
    asked = [index for index in range(len(exit_layers) - 1) if policy.wants(index)]
    leaves = torch.stack([policy.leaves(trace.scores[:, index], index) for index in range(len(exit_layers) - 1)], 1)
    first = torch.where(leaves.any(1), leaves.int().argmax(1), torch.tensor(-1)).tolist()
    tokens, begin, total = [*map(_Draft, first, *_at(trace, first))], 0, _Total()
    for length, ended in zip(trace.lengths, trace.ended, strict=True):
        _replay_text(tokens[begin : begin + length], ended, most, exit_layers, asked, costs, total)
        begin += length
    plain = exit_layers[-1] * costs.layer + costs.words if costs.plain is None else costs.plain
    prompt = costs.prompt * len(trace.lengths) / len(tokens)
    return Replayed(
        cost=total.cost / len(tokens) + prompt,
        plain=plain + prompt,
        layer_calls=total.calls / len(tokens),
        drafted=total.drafted / len(tokens),
        accepted=total.accepted / max(total.drafted, 1),
    )


class _Draft(NamedTuple):
    """A token: the exit it leaves at, -1 for the last, and whether its draft is right there, and ends a text."""

    exit_index: int
    right: bool
    ends: bool


def _at(trace: DraftTrace, exits: list[int]) -> tuple[list[bool], list[bool]]:
    """What a trace says of each token's draft at an exit of its own; of the last exit nothing is read."""
    places = torch.tensor(exits)[:, None].clamp_min(0)
    return trace.right.gather(1, places)[:, 0].tolist(), trace.ends.gather(1, places)[:, 0].tolist()


@dataclass
class _Total:
    cost: float = 0.0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0


def _replay_text(
    tokens: list[_Draft],
    ended: bool,
    most: int,
    exit_layers: Sequence[int],
    asked: list[int],
    costs: DraftCosts,
    total: _Total,
) -> None:
    """Add the run of one text; tokens drafted behind its end are taken to leave as the last one does."""
    start, last = 0, len(tokens) - 1
    while start <= last:
        waits: list[tuple[int, int]] = []  # depth and number of tokens, the deepest first
        place, drafts = start, 0
        while True:
            may_ask = drafts < most and (ended or place < last)
            token = tokens[min(place, last)] if may_ask else _Draft(-1, False, False)
            total.cost += costs.token
            if may_ask:
                total.cost += costs.ask * sum(1 for one in asked if token.exit_index < 0 or one <= token.exit_index)
            drafts += token.exit_index >= 0
            checks = token.exit_index < 0 or token.ends  # what ends a text is checked at once
            depth = exit_layers[-1 if checks else token.exit_index]
            at, width = 0, 1
            while at < depth:
                until = min(depth, waits[-1][0]) if waits else depth
                total.calls += until - at
                total.cost += (until - at) * (costs.layer + costs.more * (width - 1))
                at = until
                if waits and waits[-1][0] == at:
                    width += waits.pop()[1]
            waits.append((at, width))
            if checks:
                break
            place += 1
        total.cost += costs.draft * drafts + costs.words + costs.more_words * (place - start)
        kept = 0
        while kept < drafts and tokens[start + kept].right:
            kept += 1
        total.drafted += drafts
        total.accepted += kept
        start += kept + 1
