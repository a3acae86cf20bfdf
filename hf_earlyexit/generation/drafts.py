"""Which token comes next: as an exit drafts it, and as the last layer checks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draft(NamedTuple):
    """A token that an exit proposes.

    Attributes:
        token: its id.
        exit_index: of the exit, 0-based.
        chances: what it was drawn from `[V]`; `None` where it is the exit's first choice.
    """

    token: int
    exit_index: int
    chances: Tensor | None = None


class Waiting(NamedTuple):
    """Neighbouring tokens of a row that have run the same layers: their states `[N, H]` after `depth` layers."""

    depth: int
    column: int
    states: Tensor


@dataclass
class Row:
    """One row's text.

    Attributes:
        number: in the batch.
        text: ids, what is drafted at their end, and room for more.
        length: ids that are accepted, the prompt's among them.
        shift: columns of the prompt that have no id (prompts that came as embeddings).
        offset: what its columns are ahead of its positions.
        waits: tokens that wait, the deepest first; the newest come last.
        drafts: what follows each of them.
        exit_layers: of the tokens written: where each was drafted, or the last layer.
        scores, logits: of the last layer for these tokens, where they are kept, with and without the processors.
        stopped: whether a criterion has ended it.
    """

    number: int
    text: Tensor
    length: int
    shift: int
    offset: int
    waits: list[Waiting] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    exit_layers: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    stopped: bool = False

    @property
    def column(self) -> int:
        """Where the newest token stands, accepted or drafted."""
        return self.length + len(self.drafts) - 1 + self.shift

    def add(self, draft: Draft) -> None:
        """Go on from a draft."""
        self._write(self.length + len(self.drafts), draft.token)
        self.drafts.append(draft)

    def accept(self, token: int, exit_layer: int) -> None:
        """One more token for good."""
        self._write(self.length, token)
        self.length += 1
        self.exit_layers.append(exit_layer)

    def _write(self, place: int, token: int) -> None:
        if place == len(self.text):
            self.text = torch.cat([self.text, self.text.new_zeros(max(len(self.text), 64))])
        self.text[place] = token


# Of transformers, those that treat every row alike; others may know rows by number. By name: releases have different ones.
ROW_BLIND = frozenset({
    "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper",
    "EpsilonLogitsWarper", "EtaLogitsWarper", "NoRepeatNGramLogitsProcessor", "MinLengthLogitsProcessor",
    "SuppressTokensLogitsProcessor", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
    "SequenceBiasLogitsProcessor", "NoBadWordsLogitsProcessor", "LogitNormalization", "InfNanRemoveLogitsProcessor",
    "MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria",
})  # fmt: skip


class Speaker:
    """Picks tokens: greedily, or by the rule that makes checked drafts a sample of the full model's distribution.

    Rows are at different places, so processors and criteria see one row's text at a time: in every place of the batch where
    they may know rows by number, and that row's answer is read.

    Args:
        batch: number of rows.
        processors: change scores, as `generate` prepared them.
        criteria: end texts, as `generate` prepared them.
        samples: whether tokens are drawn.
        keep_scores, keep_logits: whether rows keep them.
        streamer: gets every token as soon as it is final, or `None`.
    """

    def __init__(
        self,
        batch: int,
        processors: Any,
        criteria: Any,
        samples: bool,
        keep_scores: bool = False,
        keep_logits: bool = False,
        streamer: Any = None,
    ) -> None:
        self.places, self.criteria_places = (
            1 if all(type(part).__name__ in ROW_BLIND for part in parts) else batch for parts in (processors, criteria)
        )
        self.processors, self.criteria, self.samples = processors, criteria, samples
        self.keep_scores, self.keep_logits, self.streamer = keep_scores, keep_logits, streamer
        ends = [criterion.eos_token_id for criterion in criteria if hasattr(criterion, "eos_token_id")]
        self.ends = {int(token) for tokens in ends for token in torch.as_tensor(tokens).flatten().tolist()}
        self.pads = bool(ends)  # else rows that have ended write on, as in the stock loop

    def draft(self, rows: Sequence[Row], exit_index: int, logits: Tensor, words: Tensor | None, size: int) -> list[bool]:
        """Let rows go on from what an exit answers; says of each whether it did.

        Args:
            rows: whose newest tokens have just left.
            exit_index: of the exit.
            logits: `[R, K]` over `words`, or `[R, V]`.
            words: vocabulary ids `[K]`, or `None` for the whole vocabulary.
            size: V.
        """
        logits = logits.float()
        if not self.processors and not self.samples:
            best = logits.argmax(-1)
            for row, token in zip(rows, (best if words is None else words[best]).tolist(), strict=True):
                row.add(Draft(token, exit_index))
            return [True] * len(rows)
        if words is not None:
            logits = logits.new_full((len(rows), size), -torch.inf).index_copy_(1, words, logits)
        made = []
        for place, row in enumerate(rows):
            scores = self._processed(row, row.length + len(row.drafts), logits[place])
            made.append(bool(scores.isfinite().any()))  # else every word the exit knows is forbidden
            if made[-1]:
                chances = scores.softmax(-1) if self.samples else None
                token = scores.argmax(-1) if chances is None else chances.multinomial(1)
                row.add(Draft(int(token), exit_index, chances))
        return made

    def check(self, row: Row, logits: Tensor, exit_layers: Sequence[int]) -> int:
        """Accept drafts up to the first wrong one, which is replaced; returns how many were right.

        Args:
            row: whose waiting tokens have run every layer.
            logits: of the last layer for what follows each of them `[N, V]`.
            exit_layers: layers (1-based) of all exits.
        """
        drafts, right = row.drafts, 0
        logits = logits.float()
        best = None if self.processors or self.samples else logits.argmax(-1).tolist()
        for place, given in enumerate(logits):
            draft = drafts[place] if place < len(drafts) else None
            scores = given if best is not None else self._processed(row, row.length, given)
            token = best[place] if best is not None else self._token(scores, draft)
            agrees = draft is not None and token == draft.token
            row.accept(token, exit_layers[draft.exit_index] if agrees and draft else exit_layers[-1])
            right += agrees
            if self._ends(row, given, scores) or not agrees:
                break
        row.drafts, row.waits = [], []
        return right

    def _token(self, scores: Tensor, draft: Draft | None) -> int:
        if not self.samples:
            return int(scores.argmax(-1))
        chances = scores.softmax(-1)
        if draft is None:
            return int(chances.multinomial(1))
        assert draft.chances is not None
        odds = float(chances[draft.token] / draft.chances[draft.token])
        if float(torch.rand((), device=chances.device)) < odds:
            return draft.token
        rest = (chances - draft.chances).clamp_min(0)  # nothing of the draft is in it, as its odds were below 1
        return int((rest if rest.any() else chances).multinomial(1))

    def _ends(self, row: Row, logits: Tensor, scores: Tensor) -> bool:
        """Keep what was asked for of the row's newest token, and say whether the text ends with it."""
        if self.keep_scores:
            row.scores.append(scores)
        if self.keep_logits:
            row.logits.append(logits)
        if self.streamer is not None:
            self.streamer.put(row.text[row.length - 1 : row.length].cpu())
        if row.stopped:  # it writes on only until all have stopped
            return False
        places = self.criteria_places
        kept = tuple(one.expand(places, -1) for one in row.scores) if self.keep_scores else None
        stops = self.criteria(row.text[: row.length].repeat(places, 1), kept)
        row.stopped = bool(stops[row.number if places > 1 else 0])
        return row.stopped

    def _processed(self, row: Row, length: int, logits: Tensor) -> Tensor:
        """Scores `[V]` of what follows the first `length` ids of a row."""
        scores: Tensor = self.processors(row.text[:length].repeat(self.places, 1), logits.repeat(self.places, 1))
        return scores[row.number if self.places > 1 else 0]
