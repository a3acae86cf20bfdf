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


class DraftTrace(NamedTuple):
    """Every early exit on the tokens of some texts that may leave: all that follow the prompt but the last.

    Attributes:
        scores: the policy's `[N, E - 1]`, float32; -inf at muted exits.
        right: whether the exit's draft is what the full model wrote `[N, E - 1]`.
        lengths: tokens of each text, N together.
    """

    scores: Tensor
    right: Tensor
    lengths: tuple[int, ...]


class DraftCosts(NamedTuple):
    """What parts of a pass cost, in seconds or any other unit.

    Attributes:
        layer: one layer for one token; more: for every further token of the same pass.
        ask: an exit's signal and the policy's step.
        words: the last layer's vocabulary for one token; more_words: for every further token.
    """

    layer: float
    more: float
    ask: float
    words: float
    more_words: float


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """A lossless run as a trace lets expect it.

    Attributes:
        cost: per token written, in the unit of the costs; plain: that of plain decoding.
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
def trace_drafts(model: TorchExitWriter, texts: Sequence[FullText], policy: ExitPolicy) -> DraftTrace:
    """Scores and drafts of every early exit along texts of the full model.

    Args:
        model: a captioner or language model with exits, in evaluation mode.
        texts: that it wrote.
        policy: whose scores.

    Raises:
        CalibrationError: if no text has a token that may leave.
    """
    scores, right, lengths = [], [], []
    for text in texts:
        if len(text.ids) - 1 <= text.start:  # the first token comes from the prompt
            continue
        ids = torch.tensor(text.ids, device=model.device)
        states, _ = model.full_pass(model.prompt_inputs([text.prompt]), ids[None, :-1], text.start)
        one_score, one_right = _ask(model, policy, [part[0][:, None] for part in states], ids[text.start + 1 :])
        scores.append(one_score)
        right.append(one_right)
        lengths.append(len(ids) - 1 - text.start)
    if not lengths:
        raise CalibrationError(
            "No text has a token that may leave: the first comes from the prompt, and all end there. Let generation go on.",
            field="rows",
        )
    return DraftTrace(torch.cat(scores), torch.cat(right), tuple(lengths))


def _ask(model: TorchExitWriter, policy: ExitPolicy, hidden: list[Tensor], following: Tensor) -> tuple[Tensor, Tensor]:
    walker = DecoderWalker(model, policy, ExitRun(policy))
    state = policy.init_state(len(following), walker.num_words, model.device)
    scores, right = [], []
    for index, layer in enumerate(model.exit_layers[:-1]):
        answer = None
        score = torch.full((len(following),), -torch.inf)
        if index not in policy.muted:
            signal = walker.exit_signal(index, hidden[layer], None, policy.asks_at(index), hidden[layer - 1])
            state, score, answer = policy.update(state, signal, index)
        logits, words = walker.draft_logits(index, hidden[layer][:, 0], answer)
        best = logits.argmax(-1)
        scores.append(score.float().cpu())
        right.append(((best if words is None else words[best]) == following).cpu())
    return torch.stack(scores, 1), torch.stack(right, 1)


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
    right, total = trace.right.tolist(), _Total()
    begin = 0
    for length in trace.lengths:
        _replay_text(first[begin : begin + length], right[begin : begin + length], most, exit_layers, asked, costs, total)
        begin += length
    tokens = len(first)
    return Replayed(
        cost=total.cost / tokens,
        plain=exit_layers[-1] * costs.layer + costs.words,
        layer_calls=total.calls / tokens,
        drafted=total.drafted / tokens,
        accepted=total.accepted / max(total.drafted, 1),
    )


@dataclass
class _Total:
    cost: float = 0.0
    calls: int = 0
    drafted: int = 0
    accepted: int = 0


def _replay_text(
    leaves: list[int],
    right: list[list[bool]],
    most: int,
    exit_layers: Sequence[int],
    asked: list[int],
    costs: DraftCosts,
    total: _Total,
) -> None:
    """Add the run of one text."""
    start = 0
    while start < len(leaves):
        waits: list[tuple[int, int]] = []  # depth and number of tokens, the deepest first
        place = start
        while True:
            may_ask = place - start < most and place < len(leaves) - 1
            index = leaves[place] if may_ask else -1
            depth = exit_layers[index]  # the last one's for -1
            if may_ask:
                total.cost += costs.ask * sum(1 for one in asked if index < 0 or one <= index)
            at, width = 0, 1
            while at < depth:
                until = min(depth, waits[-1][0]) if waits else depth
                total.calls += until - at
                total.cost += (until - at) * (costs.layer + costs.more * (width - 1))
                at = until
                if waits and waits[-1][0] == at:
                    width += waits.pop()[1]
            waits.append((at, width))
            if index < 0:
                break
            total.drafted += 1
            place += 1
        total.cost += costs.words + costs.more_words * (place - start)
        kept = 0
        while start + kept < place and right[start + kept][leaves[start + kept]]:
            kept += 1
        total.accepted += kept
        start += kept + 1
