"""Many rows through the layers: chunks stay full although rows leave them at every exit.

A chunk runs on from exit to exit as long as it is at least half full. Once it is not, it waits at its depth, and the next
rows are let in; whoever waits at the same depth is joined to them when there are enough. Rows are let in by length, so the
rows that meet are of similar length and hardly any padding is computed.

A step has two halves: launch (layers, exit, policy) and settle (wait for who leaves, and drop them). With several lanes the
next chunks are launched before the first is settled, so that an accelerator computes while its decisions travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EarlyExitError, UsageError
from ..policies.base import ExitPolicy
from ..transfer import index_of, sent
from ..values import check_whole
from ..walking.step import Standing, parted
from .answers import DEADLINE, ERROR, LAST_LAYER, LAYER_BUDGET, POLICY, Answers, Leaving
from .batching import batch_places
from .chunks import Chunk, Flight, Passed, some_rows
from .course import Course
from .rows import TokenIds
from .walker import BatchWalker

if TYPE_CHECKING:
    from .shadow import Shadow


class Scheduler:
    """Runs windows of rows. Holds no more than one chunk a layer and a lane besides the rows' token ids.

    Args:
        walker: the model.
        policy: says who leaves; `None` runs every layer and asks the last exit alone.
        max_batch_tokens: most padded tokens of a chunk, at least 1; a longer row stands alone.
        layer_budget: most layers a row may run; whoever is left leaves at the last exit within it.
        ends_at: `time.monotonic()` from which on no layer is begun; rows then leave at the last exit they passed. With `inf`
            rows remember that exit, for a course whose rows may be called off.
        on_done: told the number of rows whenever some have been answered.
        lanes: chunks that are under way at once, at least 1; as the walker likes it by default.
        stops: more depths (layers) at which chunks can wait.

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
        lanes: int | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        lanes = walker.lanes if lanes is None else lanes
        check_whole(1, max_batch_tokens=max_batch_tokens, lanes=lanes)
        if layer_budget is not None:
            check_whole(layer_budget=layer_budget)
        self.walker, self.policy, self.max_batch_tokens, self.lanes = walker, policy, max_batch_tokens, lanes
        self.ends_at, self.on_done = ends_at, on_done
        muted = () if policy is None else policy.muted
        in_use = [index for index in range(len(walker.exit_layers)) if index not in muted]
        within = [i for i in in_use if layer_budget is None or walker.exit_layers[i] <= layer_budget]
        if not within:
            first = walker.exit_layers[in_use[0]]
            raise UsageError(
                f"layer_budget is {layer_budget}; the first exit in use is after layer {first}: expected at least {first}.",
                field="layer_budget",
                value=layer_budget,
            )
        self.last = within[-1]
        self.exit_at = {walker.exit_layers[index]: index for index in within if self._asks(index)}
        every_layer = range(1, walker.exit_layers[self.last] + 1)
        self.stops = sorted({*(self.exit_at if ends_at is None else every_layer), *stops})  # depths where a chunk can wait

    def _asks(self, index: int) -> bool:
        """Whether an exit must be computed: the policy looks at it, or rows may have to leave there all the same."""
        return index == self.last or self.ends_at is not None or (self.policy is not None and self.policy.wants(index))

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[TokenIds | EarlyExitError],
        first: int = 0,
        shadow: Shadow | None = None,
        checked: bool = False,
    ) -> Answers:
        """Answers in the order of the rows.

        Args:
            rows: token ids; an error instead of a row stays in its place.
            first: the number of the first row, for the errors.
            shadow: follows rows that leave; its places are those of the rows.
            checked: the walker can read all of these rows, and somebody has looked.
        """
        answers = Answers.blank(len(rows), self.walker.num_classes)
        gone: list[Leaving] = []
        good: list[tuple[int, TokenIds]]
        good = list(enumerate(rows)) if checked else self._readable(rows, first, answers)  # type: ignore[arg-type]
        if len(good) == 1 and shadow is None and (leaving := self.alone(*good[0])) is not None:
            good = []
            gone.append(leaving)
            self.on_done(1)
        for group in self.walker.apart([row for _, row in good]):
            self._walk([good[number] for number in group], gone, shadow)
        answers.write(gone)
        answers.refuse_what_is_not_finite(first)
        return answers

    def _walk(self, rows: Sequence[tuple[int, TokenIds]], gone: list[Leaving], shadow: Shadow | None) -> None:
        """Take rows, each with its place, through the layers until all are gone."""
        course = Course(self, partial(next, self._let_in(rows), None), gone.append, shadow=shadow)
        while course.step():
            pass

    def _readable(
        self, rows: Sequence[TokenIds | EarlyExitError], first: int, answers: Answers
    ) -> list[tuple[int, TokenIds]]:
        """The rows that the model can read, with their places."""
        good: list[tuple[int, TokenIds]] = []
        for place, row in enumerate(rows):
            error = row if isinstance(row, EarlyExitError) else self.walker.check(row, first + place)
            if error is None:
                good.append((place, row))  # type: ignore[arg-type]
            else:
                answers.errors[place] = error
                answers.reason[place] = ERROR
        self.on_done(len(rows) - len(good))
        return good

    def _let_in(self, good: Sequence[tuple[int, TokenIds]]) -> Iterator[Chunk]:
        for chosen in batch_places([self.walker.length(row) for _, row in good], self.max_batch_tokens):
            if self.late():
                self.on_done(len(chosen))
                continue
            yield self.begin([good[number] for number in chosen])

    def alone(self, place: Any, row: TokenIds) -> Leaving | None:
        """How a row leaves that nobody shares a batch with, where the walker has a quicker way for it; no clock is kept."""
        every_layer = self.last == len(self.walker.exit_layers) - 1
        answered = self.walker.alone(row, self.policy) if every_layer and self.ends_at is None else None
        if answered is None:
            return None
        logits, index, score = answered
        return Leaving([place], logits, index, score, [LAST_LAYER if index == self.last else POLICY])

    def begin(self, rows: Sequence[tuple[Any, TokenIds]]) -> Chunk:
        """Rows, each with its place, before the first layer."""
        hidden, context = self.walker.begin([row for _, row in rows])
        size, classes, device = len(rows), self.walker.num_classes, hidden.device
        state = None if self.policy is None else self.policy.init_state(size, classes, device)
        passed = None if self.ends_at is None else Passed.nothing(size, classes, device)
        return Chunk(0, [place for place, _ in rows], Standing(hidden, context, state), passed)

    def launch(self, chunk: Chunk, let_go: Callable[[Leaving], Any]) -> Flight | None:
        """Layers up to where the chunk can wait, and the exit there; looks at no value, so it waits for no device."""
        rows = len(chunk.places)
        if self.late():
            if chunk.passed is not None:
                let_go(Leaving(chunk.places, *chunk.passed, [DEADLINE] * rows))
            self.on_done(rows)
            return None
        depth = next((stop for stop in self.stops if stop > chunk.depth), chunk.depth)  # behind all layers, the exit alone
        layers, index = range(chunk.depth + 1, depth + 1), self.exit_at.get(depth)
        standing, outcome, moved = self.walker.step(layers, chunk.standing, self.policy, index)
        judged = None if outcome is None or index is None else Passed(outcome.answer, index, outcome.score)
        passed = chunk.passed if chunk.passed is None or judged is None else judged
        chunk = chunk._replace(depth=depth, standing=standing, passed=passed)
        if outcome is not None and self.policy is not None:
            return Flight(chunk, judged, sent(outcome.leave), moved)
        if self.ends_at is not None:  # whoever watches the clock must not run ahead of the device
            return Flight(chunk, judged, sent(torch.zeros(rows, dtype=torch.bool, device=chunk.device)))
        return Flight(chunk, judged, lambda: [False] * rows)

    def settle(self, flight: Flight, let_go: Callable[[Chunk, Leaving], Any]) -> Chunk | None:
        """Let go who leaves, told with the rows as they stand there; `None` if nobody is left."""
        (chunk, decided), judged = flight.landed(), flight.judged
        if judged is None:
            return chunk
        answer, index, score = judged
        if index == self.last:
            deepest = index == len(self.walker.exit_layers) - 1  # where every policy lets everybody go
            reasons = [LAST_LAYER if deepest else POLICY if leaves else LAYER_BUDGET for leaves in decided]
            let_go(chunk, Leaving(chunk.places, answer, index, score, reasons))
            self.on_done(len(chunk.places))
            return None
        leaving, staying = parted(decided)
        if not leaving:
            return chunk
        gone = judged.some(index_of(leaving, answer.device))
        let_go(chunk, Leaving([chunk.places[row] for row in leaving], *gone, [POLICY] * len(leaving)))
        self.on_done(len(leaving))
        return some_rows(chunk, staying) if staying else None

    def late(self) -> bool:
        """Whether the time is over."""
        return self.ends_at is not None and time.monotonic() >= self.ends_at
