"""Many rows through the layers: chunks stay full although rows leave them at every exit.

A chunk runs on from layer to layer as long as it is at least half full. Once it is not, it waits at its depth, and the next
rows are let in; whoever waits at the same depth is joined to them when there are enough. Rows are let in by length, so the
rows that meet are of similar length and hardly any padding is computed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..backbones.base import Context
from ..errors import DataError, UsageError
from ..policies.base import ExitPolicy, ExitSignal
from .batching import cut
from .rows import TokenIds

POLICY, LAST_LAYER, LAYER_BUDGET, DEADLINE, ERROR = "policy", "last layer", "layer budget", "deadline", "error"


class BatchWalker(Protocol):
    """A model whose rows can be put together anew at every depth."""

    exit_layers: tuple[int, ...]
    num_classes: int

    def check(self, row: TokenIds, number: int) -> DataError | None: ...

    def begin(self, rows: Sequence[TokenIds]) -> tuple[Tensor, Context]: ...

    def run_layer(self, layer: int, hidden: Tensor, context: Context) -> Tensor: ...

    def exit_signal(self, exit_index: int, hidden: Tensor, context: Context, with_gate: bool = False) -> ExitSignal: ...

    def join(self, parts: Sequence[tuple[Tensor, Context]]) -> tuple[Tensor, Context]: ...


class Passed(NamedTuple):
    """The last exit that rows passed: its answer `[B, C]`, exit index `[B]` (-1 before the first) and score `[B]`."""

    answer: Tensor
    exit_index: Tensor
    score: Tensor


class Chunk(NamedTuple):
    """Rows of one depth: their places, what the layers need, what the policy and the deadline remember."""

    depth: int
    places: list[int]
    hidden: Tensor
    context: Context
    state: Any
    passed: Passed | None

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return math.prod(self.hidden.shape[:-1])


class Leaving(NamedTuple):
    """Rows that leave together: their places, and as in `Passed` what they leave with, and why."""

    places: list[int]
    answer: Tensor
    exit_index: Tensor | int
    score: Tensor
    reasons: list[str]


@dataclass
class Answers:
    """Answers of N rows on the host, filled as rows leave; a row without one has nan, exit index -1 and the reason why."""

    logits: Tensor
    exit_index: Tensor
    score: Tensor
    reason: list[str]
    errors: dict[int, DataError] = field(default_factory=dict)

    @classmethod
    def blank(cls, rows: int, num_classes: int) -> Answers:
        """No answers yet."""
        nan = torch.full((rows, num_classes), torch.nan)
        return cls(nan, torch.full((rows,), -1), torch.full((rows,), torch.nan), [DEADLINE] * rows)

    def write(self, groups: Sequence[Leaving]) -> None:
        """Put down what rows left with."""
        if not groups:
            return
        places = torch.tensor([place for group in groups for place in group.places])
        self.logits[places] = torch.cat([group.answer for group in groups]).float().cpu()
        self.score[places] = torch.cat([group.score for group in groups]).float().cpu()
        exits = [
            g.exit_index.tolist() if isinstance(g.exit_index, Tensor) else [g.exit_index] * len(g.places) for g in groups
        ]
        self.exit_index[places] = torch.tensor([index for group in exits for index in group])
        for group in groups:
            for place, reason in zip(group.places, group.reasons, strict=True):
                self.reason[place] = reason


class Scheduler:
    """Runs windows of rows. Holds no more than one chunk a layer besides the rows' token ids.

    Args:
        walker: the model.
        policy: says who leaves; `None` runs every layer and asks the last exit alone.
        max_batch_tokens: most padded tokens of a chunk, at least 1; a longer row stands alone.
        layer_budget: most layers a row may run; whoever is left leaves at the last exit within it.
        ends_at: `time.monotonic()` from which on no layer is begun; rows then leave at the last exit they passed.
        on_done: told the number of rows whenever some have been answered.

    Raises:
        UsageError: for numbers out of range.
    """

    def __init__(
        self,
        walker: BatchWalker,
        policy: ExitPolicy | None,
        max_batch_tokens: int,
        layer_budget: int | None = None,
        ends_at: float | None = None,
        on_done: Callable[[int], Any] = lambda rows: None,
    ) -> None:
        if max_batch_tokens < 1:
            raise UsageError(
                f"max_batch_tokens is {max_batch_tokens}; expected at least 1.",
                field="max_batch_tokens",
                value=max_batch_tokens,
            )
        self.walker, self.policy, self.max_batch_tokens = walker, policy, max_batch_tokens
        self.ends_at, self.on_done = ends_at, on_done
        muted = () if policy is None else policy.muted
        self.open = [index for index in range(len(walker.exit_layers)) if index not in muted]
        within = [i for i in self.open if layer_budget is None or walker.exit_layers[i] <= layer_budget]
        if not within:
            first = walker.exit_layers[self.open[0]]
            raise UsageError(
                f"layer_budget is {layer_budget}; the first exit in use is after layer {first}: expected at least {first}.",
                field="layer_budget",
                value=layer_budget,
            )
        self.last = within[-1]
        self.exit_at = {walker.exit_layers[index]: index for index in within if self._asks(index)}

    def _asks(self, index: int) -> bool:
        """Whether an exit must be computed: the policy looks at it, or rows may have to leave there all the same."""
        return index == self.last or self.ends_at is not None or (self.policy is not None and self.policy.wants(index))

    @torch.inference_mode()
    def run(self, rows: Sequence[TokenIds | DataError], first: int = 0) -> Answers:
        """Answers in the order of the rows.

        Args:
            rows: token ids; an error instead of a row stays in its place.
            first: the number of the first row, for the errors.
        """
        answers = Answers.blank(len(rows), self.walker.num_classes)
        gone: list[Leaving] = []
        waiting: list[list[Chunk]] = [[] for _ in range(self.walker.exit_layers[self.last] + 1)]
        for chunk in self._let_in(rows, first, answers):
            going: Chunk | None = chunk
            while going is not None:
                left = self._advance(going, gone)
                going = None if left is None else self._meet(waiting[left.depth], left)
        for depth, pile in enumerate(waiting):
            if pile:
                left = self._advance(self._join(pile), gone)
                if left is not None:
                    waiting[depth + 1].append(left)
        answers.write(gone)
        return answers

    def _let_in(self, rows: Sequence[TokenIds | DataError], first: int, answers: Answers) -> Iterator[Chunk]:
        good: list[tuple[int, TokenIds]] = []
        for place, row in enumerate(rows):
            error = row if isinstance(row, DataError) else self.walker.check(row, first + place)
            if error is None:
                good.append((place, row))  # type: ignore[arg-type]
            else:
                answers.errors[place] = error
                answers.reason[place] = ERROR
        self.on_done(len(rows) - len(good))
        for chosen in cut([len(row["input_ids"]) for _, row in good], self.max_batch_tokens):
            if self._late():
                self.on_done(len(chosen))
                continue
            hidden, context = self.walker.begin([good[number][1] for number in chosen])
            size, classes, device = len(chosen), self.walker.num_classes, hidden.device
            state = None if self.policy is None else self.policy.init_state(size, classes, device)
            passed = None
            if self.ends_at is not None:
                nothing = torch.full((size,), torch.nan, device=device)
                passed = Passed(nothing[:, None].repeat(1, classes), torch.full((size,), -1, device=device), nothing)
            yield Chunk(0, [good[number][0] for number in chosen], hidden, context, state, passed)

    def _advance(self, chunk: Chunk, gone: list[Leaving]) -> Chunk | None:
        """One layer, and the exit after it; `None` if nobody is left."""
        if self._late():
            if chunk.passed is not None:
                gone.append(Leaving(chunk.places, *chunk.passed, [DEADLINE] * len(chunk.places)))
            self.on_done(len(chunk.places))
            return None
        depth = chunk.depth + 1
        chunk = chunk._replace(depth=depth, hidden=self.walker.run_layer(depth, chunk.hidden, chunk.context))
        index = self.exit_at.get(depth)
        if index is None:
            return chunk
        with_gate = self.policy is not None and self.policy.uses_gate
        signal = self.walker.exit_signal(index, chunk.hidden, chunk.context, with_gate)
        if self.policy is None:
            unknown = torch.full((len(chunk.places),), torch.nan, device=chunk.hidden.device)
            state, score, answer, decided = None, unknown, signal.logits, [False] * len(chunk.places)
        else:
            state, score, answer, leave = self.policy.step(chunk.state, signal, index)
            decided = leave.tolist()  # the one wait for the device
        if index == self.last:
            deepest = index == len(self.walker.exit_layers) - 1  # where every policy lets everybody go
            reasons = [LAST_LAYER if deepest else POLICY if leaves else LAYER_BUDGET for leaves in decided]
            gone.append(Leaving(chunk.places, answer, index, score, reasons))
            self.on_done(len(chunk.places))
            return None
        passed = None if chunk.passed is None else Passed(answer, torch.full_like(chunk.passed.exit_index, index), score)
        chunk = chunk._replace(state=state, passed=passed)
        if not any(decided):
            return chunk
        leaving = [row for row, leaves in enumerate(decided) if leaves]
        out = torch.tensor(leaving, device=answer.device)
        places = [chunk.places[row] for row in leaving]
        gone.append(Leaving(places, answer[out], index, score[out], [POLICY] * len(leaving)))
        self.on_done(len(leaving))
        return None if len(leaving) == len(decided) else self._stay(chunk, decided)

    def _stay(self, chunk: Chunk, decided: list[bool]) -> Chunk:
        """The rows that are not decided."""
        staying = [row for row, leaves in enumerate(decided) if not leaves]
        keep = torch.tensor(staying, device=chunk.hidden.device)
        hidden, context = chunk.context.take(chunk.hidden, staying, keep)
        passed = None if chunk.passed is None else Passed(*(part[keep] for part in chunk.passed))
        state = None if chunk.state is None else type(chunk.state)(*(part[keep] for part in chunk.state))
        return Chunk(chunk.depth, [chunk.places[row] for row in staying], hidden, context, state, passed)

    def _meet(self, pile: list[Chunk], chunk: Chunk) -> Chunk | None:
        """The chunk that goes on from this depth, or `None` while those who wait there are too few."""
        if 2 * chunk.tokens >= self.max_batch_tokens:
            return chunk
        pile.append(chunk)
        widest = max(math.prod(part.hidden.shape[1:-1]) for part in pile)  # 1 where rows stand end to end
        together = widest * sum(part.hidden.shape[0] for part in pile)
        if 2 * together < self.max_batch_tokens:
            return None
        ready = pile[:-1] if together > self.max_batch_tokens else list(pile)
        del pile[: len(ready)]
        return self._join(ready)

    def _join(self, parts: Sequence[Chunk]) -> Chunk:
        first = parts[0]
        if len(parts) == 1:
            return first
        hidden, context = self.walker.join([(part.hidden, part.context) for part in parts])
        passed = None if first.passed is None else Passed(*map(torch.cat, zip(*(p.passed for p in parts), strict=True)))
        state = first.state and type(first.state)(*map(torch.cat, zip(*(part.state for part in parts), strict=True)))
        return Chunk(first.depth, [place for part in parts for place in part.places], hidden, context, state, passed)

    def _late(self) -> bool:
        return self.ends_at is not None and time.monotonic() >= self.ends_at
