"""What rows lose at every setting of a path, counted for all settings at once where losses are whole."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .risks import Losses, Tally
from .search import Array, exits_taken, shared_thresholds

VALUES = np.array([-1.0, 0.0, 1.0])


class LossesAlong:
    """Losses of rows along a path of settings, group by group.

    Args:
        losses: of the rows at every exit.
        scores: `[N, E]`, -inf at muted exits.
        path: settings `[K, E - 1]`, nan where an exit is closed.
        member: number of each row's group `[N]`.
        num_groups: G.
    """

    def __init__(self, losses: Losses, scores: Array, path: Array, member: NDArray[np.int64], num_groups: int) -> None:
        self.losses, self.scores, self.path = losses, np.asfortranarray(scores), path
        self.member, self.num_groups = member, num_groups
        self.counts = self._count() if losses.are_whole else None  # [K, G, 3]: of losses of -1, 0 and 1

    def __len__(self) -> int:
        return len(self.path)

    def at(self, place: int) -> Array:
        """Losses `[N]` at a setting."""
        taken = exits_taken(self.scores, self.path[place])
        here: Array = self.losses.values[np.arange(len(taken)), taken]
        return here

    def tallies(self, place: int) -> list[Tally]:
        """The losses of each group at a setting."""
        if self.counts is not None:
            return [Tally(VALUES, counts) for counts in self.counts[place]]
        here = self.at(place)
        parts = [here[self.member == group] for group in range(self.num_groups)] if self.num_groups > 1 else [here]
        return [Tally(part, np.ones(len(part))) for part in parts]

    def _count(self) -> Array:
        touched = np.flatnonzero((self.losses.values != 0).any(1))  # the others lose nothing wherever they leave
        scores, member = self.scores[touched], self.member[touched]
        signs = [(self.losses.values[touched] == value).astype(np.int8) for value in (-1, 1)]  # [n, E] each
        shared = shared_thresholds(self.path)
        counts = np.zeros((len(self.path), self.num_groups, 3))
        for column, sign in zip((0, 2), signs, strict=True):
            if shared is None:
                counts[..., column] = self._one_by_one(scores, sign, member)
            else:
                counts[..., column] = self._swept(scores, sign, member, *shared)
        counts[..., 1] = np.bincount(self.member, minlength=self.num_groups) - counts.sum(-1)
        return counts

    def _one_by_one(self, scores: Array, sign: NDArray[np.int8], member: NDArray[np.int64]) -> Array:
        """How many rows of each group have the sign at the exit they take, `[K, G]`."""
        columns, rows = np.asfortranarray(scores), np.arange(len(scores))
        taken = [exits_taken(columns, setting) for setting in self.path]
        return np.array([np.bincount(member, sign[rows, exit_index], self.num_groups) for exit_index in taken])

    def _swept(
        self, scores: Array, sign: NDArray[np.int8], member: NDArray[np.int64], open_exits: NDArray[np.bool_], cuts: Array
    ) -> Array:
        """The same for one threshold shared by all open exits: see `search.sweep`, here group by group."""
        order = np.argsort(cuts, kind="stable")
        reached = np.maximum.accumulate(np.where(open_exits, scores[:, :-1], -np.inf), axis=1)
        passed = np.searchsorted(cuts[order], reached, side="right") + member[:, None] * (len(cuts) + 1)
        gain = np.diff(sign, axis=1)
        steps = np.bincount(passed.ravel(), gain.ravel(), self.num_groups * (len(cuts) + 1)).reshape(self.num_groups, -1)
        counts = np.empty((len(cuts), self.num_groups))
        counts[order] = (np.bincount(member, sign[:, 0], self.num_groups)[:, None] + np.cumsum(steps, axis=1))[:, :-1].T
        return np.rint(counts)
