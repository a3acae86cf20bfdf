"""Rows that run together: taken apart and put together without knowing what the layers need them for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transfer import Index, chosen, index_of
from ..walking.step import Moved, Standing, joined_rows, parted
from .answers import Leaving
from .walker import BatchWalker


class Passed(NamedTuple):
    """What an exit said of the rows that passed it: answer `[B, C]`, exit index (-1: none yet) and score `[B]`."""

    answer: Tensor
    exit_index: int
    score: Tensor

    @classmethod
    def nothing(cls, rows: int, classes: int, device: torch.device) -> Passed:
        """Of rows that have passed no exit yet."""
        score = torch.full((rows,), torch.nan, device=device)
        return cls(score[:, None].repeat(1, classes), -1, score)

    def some(self, index: Index) -> Passed:
        """Of some of the rows."""
        return Passed(chosen(self.answer, index), self.exit_index, chosen(self.score, index))


class Chunk(NamedTuple):
    """Rows of one depth: their places, how they stand there, and the last exit they passed, for a deadline.

    A place is whatever names a row to the one who let it in.
    """

    depth: int
    places: list[Any]
    standing: Standing
    passed: Passed | None

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.standing.hidden.device

    @property
    def tokens(self) -> int:
        """Tokens, padding included."""
        return math.prod(self.standing.hidden.shape[:-1])

    @property
    def width(self) -> int:
        """Tokens of the widest row where rows are padded; 1 where they stand end to end."""
        return math.prod(self.standing.hidden.shape[1:-1])


class Flight(NamedTuple):
    """A chunk that has been launched.

    Attributes:
        chunk: behind its layers.
        judged: the rows as the exit there sees them; `None` if none is asked.
        decided: waits for who leaves, `[B]`, in the order in which the rows were launched.
        moved: how the device has put the rows in another order, which the host learns by who leaves; `None` if it has not.
    """

    chunk: Chunk
    judged: Passed | None
    decided: Callable[[], list[bool]]
    moved: Moved | None = None

    def landed(self) -> tuple[Chunk, list[bool]]:
        """Wait for who leaves; gives the rows in the order in which they stand, and who of them does."""
        decided, chunk = self.decided(), self.chunk
        if self.moved is None:
            return chunk, decided
        leaving, staying = parted(decided)
        rows, standing = [*staying, *leaving], chunk.standing
        standing = standing._replace(context=standing.context.moved(standing.hidden, rows, *self.moved))
        places = [chunk.places[row] for row in rows]
        return chunk._replace(places=places, standing=standing), [False] * len(staying) + [True] * len(leaving)


def some_rows(chunk: Chunk, staying: Sequence[int]) -> Chunk:
    """The rows of a chunk at some positions, at least one."""
    keep = index_of(staying, chunk.device)
    passed = chunk.passed and chunk.passed.some(keep)
    return Chunk(chunk.depth, [chunk.places[row] for row in staying], chunk.standing.keep(staying, keep), passed)


def join_chunks(walker: BatchWalker, parts: Sequence[Chunk]) -> Chunk:
    """Chunks of one depth as one."""
    first = parts[0]
    if len(parts) == 1:
        return first
    hidden, context = walker.join([(part.standing.hidden, part.standing.context) for part in parts])
    passed = first.passed
    if passed is not None:  # rows of one depth have passed the same exit
        before = [part.passed for part in parts if part.passed is not None]
        passed = Passed(torch.cat([p.answer for p in before]), passed.exit_index, torch.cat([p.score for p in before]))
    standing = Standing(hidden, context, joined_rows([part.standing.state for part in parts]))
    return Chunk(first.depth, [place for part in parts for place in part.places], standing, passed)


def called_off(chunk: Chunk, reasons: Sequence[str | None], num_classes: int) -> tuple[Leaving, Chunk | None]:
    """Rows that go no further, with what the last exit they passed said of them, and the others.

    Args:
        chunk: between two depths.
        reasons: why a row goes no further `[B]`, `None` for those that go on; at least one is not.
        num_classes: C.
    """
    out = [row for row, reason in enumerate(reasons) if reason is not None]
    passed = chunk.passed or Passed.nothing(len(chunk.places), num_classes, chunk.device)
    places, why = [chunk.places[row] for row in out], [reason for reason in reasons if reason is not None]
    leaving = Leaving(places, *passed.some(index_of(out, chunk.device)), why)
    staying = [row for row, reason in enumerate(reasons) if reason is None]
    return leaving, some_rows(chunk, staying) if staying else None
