"""Rows that run together: taken apart and put together without knowing what the layers need them for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transfer import placed
from ..walking.step import Standing, joined_rows
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
        decided: waits for who leaves, `[B]`.
    """

    chunk: Chunk
    judged: Passed | None
    decided: Callable[[], list[bool]]


def some_rows(chunk: Chunk, staying: Sequence[int]) -> Chunk:
    """The rows of a chunk at some positions, at least one."""
    keep = placed(torch.tensor(staying), chunk.device)
    passed = chunk.passed and chunk.passed._replace(answer=chunk.passed.answer[keep], score=chunk.passed.score[keep])
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
    index = placed(torch.tensor(out), chunk.device)
    places, why = [chunk.places[row] for row in out], [reason for reason in reasons if reason is not None]
    leaving = Leaving(places, passed.answer[index], passed.exit_index, passed.score[index], why)
    staying = [row for row, reason in enumerate(reasons) if reason is None]
    return leaving, some_rows(chunk, staying) if staying else None
